"""Does the answer survive pruning? A synthetic video task and a small model trained on it.

The weights of `toy` are random, and random weights cannot tell a good selection from a bad one.
Here is a task with right answers, made from seeds, and a small Qwen2.5-VL that learns it.
"""
