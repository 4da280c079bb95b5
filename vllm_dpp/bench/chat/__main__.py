"""`python -m vllm_dpp.bench.chat`."""

import sys

from vllm_dpp.bench.chat.command import main

sys.exit(main())
