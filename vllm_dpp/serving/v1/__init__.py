"""The V1 model runner's side, which CPUs without Triton use. Delete it when vLLM deletes that runner."""
