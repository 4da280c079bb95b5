"""Whole engines against stock vLLM: `vllm-dpp bench throughput`."""
