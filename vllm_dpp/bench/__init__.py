"""Measurements: the pruner alone, its large segments, engines and their answers; and `results`."""
