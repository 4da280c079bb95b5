"""`python -m vllm_dpp.bench.pruner`."""

import sys

from vllm_dpp.bench.pruner.command import main

try:
    sys.exit(main())
except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
