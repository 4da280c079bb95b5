import sys

from vllm_dpp.bench.quality.command import main

if __name__ == "__main__":  # engines run in processes that import this module
    sys.exit(main())
