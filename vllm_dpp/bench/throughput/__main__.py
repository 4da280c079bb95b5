"""`python -m vllm_dpp.bench.throughput`."""

import sys

from vllm_dpp.bench.throughput.command import main

sys.exit(main())
