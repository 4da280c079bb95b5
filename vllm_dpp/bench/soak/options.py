"""The command line of the soak."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vllm_dpp.bench.chat.arms import Arm
from vllm_dpp.bench.help import HelpFormatter
from vllm_dpp.bench.soak.cases import PATCH

MODULE = "vllm_dpp.bench.soak"
TRAINED = "trained"
QUESTION_ROOM = 96  # the longest question about the longest video leaves little of the buffer


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments; wrong ones end the program with status 2."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="A real server under videos, images, text, chats, clients that hang up, broken "
        "files and bad arguments at once, with too little KV memory: every answer must be its "
        "serial answer, every bad request get a 4xx, and nothing stay behind. Requests choose "
        "shares and ratios for themselves, or leave them to the server. Other flags go to it.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default=TRAINED, help="`trained`, the project's own, or what `bench chat` takes")
    add("--minutes", type=float, default=10, help="of the soak; checks before and after take more")
    add("--clients", type=int, default=32, help="at once")
    add("--cases", type=int, default=8, help="requests of each kind; clients repeat them")
    add("--seed", type=int, default=1, help="of requests and clients")
    add("--stock", action="store_true", help="stock vLLM, for comparison: without our arguments")
    add("--entry-only", action="store_true", help="leave tokens out before the decoder alone")
    add("--compiled", action="store_true", help="compile the layers, as vLLM does unless told not")
    add("--long-tokens", type=int, default=2048, help="tokens of the long videos")
    add("--side", type=int, default=224, metavar="PIXELS", help="of the largest frames")
    add("--max-num-batched-tokens", type=int, default=512, help="limit of tokens in a step")
    add("--max-num-seqs", type=int, default=32, help="limit of running requests")
    add("--max-model-len", type=int, default=3072, help="limit of tokens in a request")
    add("--kv-cache-mib", type=int, default=24, help="KV memory, too little for all clients")
    add("--block-size", type=int, default=32, help="tokens in a KV block")
    add("--media-cache-mib", type=int, default=64, help="so that videos are dropped from it")
    add("--output", type=Path, metavar="FILE.json", help="all counts with provenance; FILE.md too")
    options, flags = parser.parse_known_args(argv)
    options.flags = flags
    if options.stock and options.entry_only:
        parser.error("--stock leaves nothing out: take --entry-only away")
    if options.minutes <= 0 or options.clients < 1 or options.cases < 1:
        parser.error("--minutes, --clients and --cases must be positive")
    if options.side < 2 * PATCH or options.long_tokens < 2 * (options.side // PATCH) ** 2:
        parser.error(
            f"--side must be at least {2 * PATCH}, and a long video have at least two slices: "
            "raise --long-tokens"
        )
    return options


def command_of(options: argparse.Namespace, model: str, *, on_cpu: bool) -> list[str]:
    """What starts the server."""
    room = str(options.long_tokens + QUESTION_ROOM)
    pruning = ["--entry-only"] if options.entry_only else ["--max-deferred-tokens", room]
    flags = [
        *("--max-num-batched-tokens", str(options.max_num_batched_tokens)),
        *("--max-num-seqs", str(options.max_num_seqs)),
        *("--max-model-len", str(options.max_model_len)),
        *("--kv-cache-memory-bytes", str(options.kv_cache_mib << 20)),
        *("--block-size", str(options.block_size)),
        *("--mm-processor-cache-gb", str(options.media_cache_mib / 1024)),
        *("--dtype", "float32"),
        "--enable-prompt-tokens-details",
    ]
    flags += ["--enforce-eager"] if on_cpu and not options.compiled else []
    flags += [] if options.stock else pruning
    return Arm("it", not options.stock).command(model, [*flags, *options.flags])
