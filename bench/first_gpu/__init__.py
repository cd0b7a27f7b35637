"""The first minutes on a GPU: the most valuable evidence first, each part under a limit of its own."""
