"""Features of the frozen backbone, computed from images or read from a cache."""
