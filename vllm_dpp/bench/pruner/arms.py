"""The arms of the pruner benchmark: what each runs, and where it can."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from vllm_dpp.bench.pruner import peers
from vllm_dpp.bench.pruner.problem import Problem
from vllm_dpp.pruning import keep_indices
from vllm_dpp.pruning.cdpruner import global_cdpruner_segment_prune
from vllm_dpp.pruning.dpp.select import Backend, fastest_backend

GRAM, ORIGINAL, NAMES = "gram", "original", "global_cdpruner_segment_prune"
CHANGE = "change"
KEEP_INDICES = ("fused", "compiled", "torch")
"""The arms of `keep_indices`, the one it takes by itself first."""

Run = Callable[[], Tensor]
"""One selection; returns [num_kept] int64 indices, ascending."""


@dataclass(frozen=True)
class Arm:
    """One way to select.

    Args:
        meaning: what it does, for the reader of a table.
        prepare: makes what is timed from a problem; what it does itself is not timed.
        missing: what a device lacks to run it, None if nothing.
        selects: whether it selects tokens, which are then judged.
        by_default: whether it runs, where it can, without being asked for.
        rule: of `pruning.rules`, by which it is judged.
        by_shape: whether `prepare` compiles for the shapes of the problem, which takes a minute or
            more. Such an arm is not tried on parts of a video.
    """

    meaning: str
    prepare: Callable[[Problem], Run]
    missing: Callable[[torch.device], str | None] = lambda device: None
    selects: bool = True
    by_default: Callable[[torch.device], bool] = lambda device: True
    by_shape: bool = False
    rule: str = "dpp"


def _peer(select: Callable[[Problem], Tensor]) -> Callable[[Problem], Run]:
    return lambda problem: lambda: select(problem)


def _ours(backend: Backend | None, rule: str = "dpp") -> Callable[[Problem], Run]:
    def prepare(problem: Problem) -> Run:
        videos, settings = [problem.video], replace(problem.settings, rule=rule)
        return lambda: keep_indices(videos, settings, backend=backend)[0]

    return prepare


def _original_names(problem: Problem) -> Run:
    """Selects by the relevance of the original, whatever the settings of the problem."""
    case = problem.case
    inputs = problem.segment_ids, problem.features, problem.raw_relevance, case.num_kept
    budgets = [case.kept_per_segment] * case.num_segments
    return lambda: global_cdpruner_segment_prune(budgets, *inputs)


def _torch_compile(problem: Problem) -> Run:
    """`torch.compile` of the batched loop that compiles best: into one graph, for these shapes."""
    torch.compiler.reset()  # earlier shapes would make these ones dynamic
    run = _peer(torch.compile(peers.batched, dynamic=False, fullgraph=True))(problem)
    run()
    return run


def _gram(problem: Problem) -> Run:
    rows = problem.by_segment.float()
    return lambda: peers.gram(rows)


def _needs(backend: Backend, what: str) -> Callable[[torch.device], str | None]:
    return lambda device: None if fastest_backend(device) == backend else f"needs {what}"


ARMS: dict[str, Arm] = {
    ORIGINAL: Arm(
        "one global kernel, a slice per segment, a step per token", _peer(peers.original)
    ),
    "per-segment": Arm("a kernel per segment, a step per token", _peer(peers.per_segment)),
    "cdpruner": Arm("all segments batched in CDPruner's loop", _peer(peers.batched)),
    "torch": Arm("ours: batched loop of PyTorch calls", _ours("torch")),
    "compiled": Arm(
        "ours: loop compiled for the CPU", _ours("compiled"), _needs("compiled", "a CPU and numba")
    ),
    "fused": Arm(
        "ours: Triton kernel", _ours("fused"), _needs("fused", "an NVIDIA GPU and Triton")
    ),
    CHANGE: Arm(
        "ours: `keep_indices` by the rule of that name, where a segment is a slice",
        _ours(None, CHANGE),
        rule=CHANGE,
    ),
    NAMES: Arm("ours: `keep_indices` by the name and arguments of the original", _original_names),
    "torch.compile": Arm(
        "torch.compile of the loop of `cdpruner`, which gives one graph",
        _torch_compile,
        lambda device: None if device.type == "cpu" or find_spec("triton") else "needs Triton",
        # Minutes of compilation for every shape on a CPU.
        by_default=lambda device: device.type == "cuda",
        by_shape=True,
    ),
    GRAM: Arm("bare products of each segment's features", _gram, selects=False),
}


def choose(
    names: Sequence[str] | None, device: torch.device
) -> tuple[dict[str, Arm], dict[str, str]]:
    """The arms that run and, by name, why others cannot.

    Args:
        names: the arms asked for, None for every default one.
        device: where they run.

    Raises:
        ValueError: a name is unknown, or no arm is left.
    """
    for name in names or ():
        if name not in ARMS:
            raise ValueError(f"unknown arm {name!r}: expected some of {', '.join(ARMS)}")
    wanted = names or [name for name, arm in ARMS.items() if arm.by_default(device)]
    missing = {name: ARMS[name].missing(device) for name in wanted}
    lacking = {name: reason for name, reason in missing.items() if reason is not None}
    chosen = {name: ARMS[name] for name in wanted if name not in lacking}
    if not chosen:
        reasons = "; ".join(f"{name} {reason}" for name, reason in lacking.items())
        raise ValueError(f"no arm can run: {reasons}")
    return chosen, lacking
