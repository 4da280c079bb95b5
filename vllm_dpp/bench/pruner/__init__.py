"""The pruner against other algorithms: `vllm-dpp bench pruner`."""
