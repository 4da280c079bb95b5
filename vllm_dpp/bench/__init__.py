"""Measurements: the pruner alone, its large segments, whole engines, their answers; and `results`."""
