"""File formats: bytes to records and back, and how files are written."""
