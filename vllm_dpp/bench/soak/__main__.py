"""`python -m vllm_dpp.bench.soak`."""

import sys

from vllm_dpp.bench.soak.command import main

sys.exit(main())
