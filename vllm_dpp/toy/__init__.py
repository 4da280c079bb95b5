"""Small checkpoints and videos that the project makes itself.

The tests and the CPU benchmarks use them, so that none of these downloads anything.
The weights are random: what such a model says means nothing, but it depends on all of its input.
"""
