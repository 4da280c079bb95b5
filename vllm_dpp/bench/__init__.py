"""Measurements: the pruner alone, its large segments, and whole engines. Results are in `results`."""
