"""The command line of the chat benchmark."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vllm_dpp.bench.chat.arms import ARMS
from vllm_dpp.bench.help import HelpFormatter
from vllm_dpp.serve_command import DEFAULT_SHARE

MODULE = "vllm_dpp.bench.chat"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments; wrong ones end the program with status 2."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Conversations about a video, and streams that decode while a long video "
        "arrives, on stock and pruned servers over HTTP. All servers stay up and are asked in "
        "turn, one request at a time. Other flags go to every server.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default="toy:mid", help="a checkpoint, or toy:mid or toy:tiny (random weights)")
    add("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help=", ".join(ARMS))
    add("--retention-ratio", type=float, default=0.25, help="r of the pruned servers")
    add("--prune-layer", type=int, help="K of the pruned servers; left out: the plugin's own")
    add("--decide-every", type=int, default=512, help="tokens of a piece, for dpp-pieces")
    add("--video-share", type=float, default=DEFAULT_SHARE, help="for dpp-share")
    add("--repeats", type=int, default=5, help="rounds, each with a video of its own")
    add("--side", type=int, default=224, help="height and width of every video, in pixels")
    add("--chat-frames", type=int, default=32, help="frames of the video that is talked about")
    add("--long-frames", type=int, default=128, help="frames of the video that arrives")
    add("--streams", type=int, default=4, help="streams that decode while it arrives")
    add("--max-num-batched-tokens", type=int, default=512, help="limit of tokens in a step")
    add("--max-model-len", type=int, default=8192, help="limit of tokens in a request")
    add("--gpu-memory-utilization", type=float, help="of each; left out: 0.9 shared by all")
    add("--output", type=Path, metavar="FILE.json", help="all numbers with provenance; FILE.md too")
    add("--plot", type=Path, metavar="FILE.png", help="draw them, with matplotlib")
    options, flags = parser.parse_known_args(argv)
    options.flags = flags
    if "stock" not in options.arms or len(set(options.arms)) < len(options.arms):
        parser.error("--arms needs stock, to which all ratios are, and every arm once")
    for name in ("repeats", "streams", "chat_frames", "long_frames", "decide_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def flags_of(options: argparse.Namespace, *, on_cpu: bool) -> list[str]:
    """The flags of `vllm serve` that all servers share."""
    flags = [
        *("--max-num-batched-tokens", str(options.max_num_batched_tokens)),
        *("--max-model-len", str(options.max_model_len)),
        "--enable-prompt-tokens-details",
    ]
    if options.model.startswith("toy:"):
        flags += ["--dtype", "float32"]
    if on_cpu:
        flags += ["--enforce-eager"]
    else:
        share = options.gpu_memory_utilization or round(0.9 / len(options.arms), 3)
        flags += ["--gpu-memory-utilization", str(share)]
    return flags + options.flags
