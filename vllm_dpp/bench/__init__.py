"""Measurements: the pruner alone, its large segments, whole engines and their answers; `results`."""
