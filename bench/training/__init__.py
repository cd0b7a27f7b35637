"""Benchmarks of both training stages: speed, memory, scaling."""
