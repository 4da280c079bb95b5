"""Measurements. ``throughput`` compares stock vLLM, EVS and mid-decoder pruning offline."""
