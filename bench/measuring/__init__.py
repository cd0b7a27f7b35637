"""Everything that the benchmarks share: timing, floors, machine, result files."""
