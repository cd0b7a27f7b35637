"""Measurements of scf_fast: accuracy against 60-digit arithmetic, and time against the published way and plain
PyTorch.
"""
