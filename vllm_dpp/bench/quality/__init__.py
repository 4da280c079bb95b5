"""How many answers survive pruning, by method, at equal cost."""
