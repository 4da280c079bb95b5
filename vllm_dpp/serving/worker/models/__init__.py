"""Pruning variants of vLLM models: a generic split decoder and one small file for each family."""
