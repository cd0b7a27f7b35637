"""Training under faults, and fuzzing of the file readers."""
