"""Other projects' own code, run where it is installed."""
