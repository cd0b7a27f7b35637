"""Tables and plots of the result files."""
