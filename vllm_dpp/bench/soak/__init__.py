"""A real server under everything at once, for minutes: `vllm-dpp bench soak`."""
