"""Benchmarks of reading and decoding images."""
