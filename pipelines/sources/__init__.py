"""Sources: data sets of every format, with random access to images and labels."""
