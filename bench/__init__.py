"""Measurements: accuracy against 60-digit arithmetic, speed against the published code and plain PyTorch."""
