"""A data set of drawn faces of known quality, in the formats of real ones."""
