"""The pruner against the original loop, its variants and the bare Gram products.

``vllm-dpp bench pruner --help`` lists the options. All arms select from the same videos. Before an
arm is timed the float64 reference judges its tokens; if one arm is wrong no time is reported.
PyTorch is all that is needed.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from vllm_dpp.bench.provenance import one_line, provenance
from vllm_dpp.bench.pruner import plot as pruner_plot
from vllm_dpp.bench.pruner import report
from vllm_dpp.bench.pruner.arms import Arm, Run, choose
from vllm_dpp.bench.pruner.judge import Judge, num_judged
from vllm_dpp.bench.pruner.options import DTYPES, MODULE, parse
from vllm_dpp.bench.pruner.problem import DESCRIPTION, Case, Problem, make_problem
from vllm_dpp.bench.pruner.timing import interleaved, too_slow, with_peak_bytes

PACKAGES = ("numba", "triton")  # that the arms use where they are installed

Advance = Callable[[str], None]
"""Told what was just done, to move a progress bar by one turn."""


class WrongTokensError(Exception):
    """An arm selects what the reference does not."""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0; 1 where an arm selects wrong tokens, with nothing reported.

    Raises:
        ValueError: an argument cannot be served.
    """
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(arguments)
    device = torch.device(options.device)
    arms, lacking = choose(options.arms, device)
    if options.plot is not None:
        pruner_plot.drawable(case.series for case in options.cases)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    turns = len(options.cases) * len(arms) * (options.repeats + 1)
    try:
        with torch.inference_mode(), progress(turns) as advance:
            cases = [_measure(case, arms, options, device, advance) for case in options.cases]
    except WrongTokensError as error:
        print(f"error: {error}\nnothing is reported", file=sys.stderr)
        return 1
    document = {
        "provenance": provenance(MODULE, arguments, PACKAGES),
        "device": options.device,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "max_kernel_bytes": options.settings.max_kernel_bytes,
        "relevance_sign": options.settings.relevance_sign,
        "relevance_floor": options.settings.relevance_floor,
        "features": DESCRIPTION,
        "arms": list(arms),
        "not_here": lacking,
        "cases": cases,
        "growth": report.growth_of(cases),
    }
    _publish(document, options)
    return 0


@contextmanager
def progress(turns: int) -> Iterator[Advance]:
    """A progress bar on stderr, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda what: None
        return
    with tqdm(total=turns, unit="turn", desc="pruner", file=sys.stderr) as bar:

        def advance(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        yield advance


def _measure(
    case: Case,
    arms: Mapping[str, Arm],
    options: Any,
    device: torch.device,
    advance: Advance,
) -> dict[str, Any]:
    """Judge, then time, every arm on one video."""
    problem = make_problem(
        case,
        seed=options.seed,
        dtype=DTYPES[options.dtype],
        device=device,
        settings=options.settings,
    )
    bounds = {
        name: too_slow(arm, problem, options.max_seconds) if not arm.by_shape else None
        for name, arm in arms.items()
    }
    skipped = {name: reason for name, reason in bounds.items() if reason is not None}
    runs = {name: arm.prepare(problem) for name, arm in arms.items() if name not in skipped}
    for name in skipped:
        for _ in range(options.repeats + 1):
            advance(f"{name} left out")
    rules = dict.fromkeys(arms[name].rule for name in runs)
    judges = {rule: Judge(problem, options.seed, rule) for rule in rules}
    checked = _check(problem, arms, runs, judges, advance)
    seconds = interleaved(
        runs, options.repeats, device, lambda name: advance(f"N {case.num_tokens} {name}")
    )
    return report.case_as_json(
        case,
        judged_segments=num_judged(case),
        skipped=skipped,
        checked=checked,
        seconds=seconds,
    )


def _check(
    problem: Problem,
    arms: Mapping[str, Arm],
    runs: Mapping[str, Run],
    judges: Mapping[str, Judge],
    advance: Advance,
) -> dict[str, dict[str, Any]]:
    """What each arm's first run shows: its memory, and near-ties where it selects.

    Raises:
        WrongTokensError: names every arm that is wrong, and how.
    """
    checked: dict[str, dict[str, Any]] = {}
    wrong = []
    for name, run in runs.items():
        result, peak_bytes = with_peak_bytes(arms[name], run, problem.features.device)
        checked[name] = {"peak_bytes": peak_bytes}
        if arms[name].selects:
            verdict = judges[arms[name].rule].verdict(result)
            checked[name]["near_ties"] = verdict.near_ties
            if verdict.fault is not None:
                wrong.append(f"arm {name} is wrong at {problem.case}: {verdict.fault}")
        del result
        advance(f"N {problem.case.num_tokens} {name}: judged")
    if wrong:
        raise WrongTokensError("; ".join(wrong))
    return checked


def _publish(document: dict[str, Any], options: Any) -> None:
    print(one_line(document["provenance"]))
    print(document["provenance"]["command"])
    print(
        f"{document['device']}, {document['threads']} threads; our arms hold at most "
        f"{document['max_kernel_bytes'] / 2**20:g} MiB of kernels at once\n"
        f"{document['dtype']} features: {document['features']}"
    )
    for name, reason in document["not_here"].items():
        print(f"{name}: not run, {reason}")
    for title, text in report.render(document):
        print(f"\n{title}\n{text}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.plot is not None:
        pruner_plot.draw(document, options.plot)
