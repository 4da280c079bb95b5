"""The scheduler alone: random traffic, a worker that only checks, no model and no forward pass."""
