"""The V1 model runner's side, for CPUs without Triton. Delete it when vLLM deletes that runner."""
