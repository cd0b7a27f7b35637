"""Weight files of every family: read, recognized, converted and written."""
