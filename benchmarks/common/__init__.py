"""What the benchmarks share: the host, ways to make a person, cached results, tables and grids."""
