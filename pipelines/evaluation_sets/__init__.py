"""Evaluation sets: verification pairs and template protocols, read and written."""
