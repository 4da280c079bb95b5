"""``python -m vllm_dpp.bench.gpu``."""

from vllm_dpp.bench.gpu.command import main

if __name__ == "__main__":
    raise SystemExit(main())
