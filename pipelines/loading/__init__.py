"""Decoding, augmentation and loaders: from encoded images to normalized batches."""
