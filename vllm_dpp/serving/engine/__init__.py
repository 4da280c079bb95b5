"""The engine's process: the scheduler and its KV blocks. Integers only, no tensors."""
