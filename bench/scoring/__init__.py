"""Benchmarks of scoring and template pooling."""
