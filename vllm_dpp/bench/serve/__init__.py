"""Servers under vLLM's own `vllm bench serve`."""
