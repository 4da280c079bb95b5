"""Real vLLM engines for the tests, each in a process of its own and open to inspection."""
