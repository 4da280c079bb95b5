"""`python -m vllm_dpp` is `vllm-dpp`."""

import sys

from vllm_dpp.cli import main

if __name__ == "__main__":
    sys.exit(main())
