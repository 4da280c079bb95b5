"""The workers' processes: the compact layout of each step, and the model that applies it."""
