"""Real servers over HTTP, stock and pruned in alternation: `vllm-dpp bench chat`."""
