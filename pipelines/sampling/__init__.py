"""Sampling: which images each rank sees, in which order, with which random numbers."""
