"""`python -m vllm_dpp.bench.serve`."""

import sys

from vllm_dpp.bench.serve.command import main

sys.exit(main())
