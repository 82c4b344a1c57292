"""Grids, search, tables, plots, analyses and benchmarks."""
