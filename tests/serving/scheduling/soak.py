"""Many schedules: ``python -m tests.serving.scheduling.soak --schedules 20000 --seed 0``."""

import argparse
import logging
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from vllm.config import VllmConfig

from tests.serving.scheduling.build import base_config
from tests.serving.scheduling.draw import draw
from tests.serving.scheduling.play import StuckError, VictimOfItsStepError, play
from tests.serving.scheduling.properties import Seen, StockFailsError, check_ends, compare
from tests.serving.scheduling.scenario import Scenario
from tests.serving.scheduling.shrink import shrink
from vllm_dpp.toy.checkpoint import make_checkpoint
from vllm_dpp.toy.spec import TINY


def fault(
    base: VllmConfig, scenario: Scenario, alone: bool, seen: Seen | None = None
) -> Exception | None:
    """What goes wrong in a scenario."""
    try:
        if alone:
            check_ends(base, scenario, play(base, scenario))
        else:
            compare(base, scenario, seen)
    except VictimOfItsStepError:
        return None
    except Exception as error:
        return error
    return None


def kind_of(error: Exception | None) -> str:
    """The fault without the names and numbers of its scenario."""
    if isinstance(error, StuckError | StockFailsError):
        return type(error).__name__
    return re.sub(r"\b(r\d+|video\d+|image\d+|\d+)\b", "#", f"{type(error).__name__}: {error}")


def soak(base: VllmConfig, seeds: range, shrinking: int, alone: bool = False) -> int:
    """Play every seed, print each fault, shrink the first ones; returns how many there were."""
    kinds: Counter[str] = Counter()
    seen = Seen()
    began = time.monotonic()
    for seed in seeds:
        scenario = draw(seed)
        if seed % 500 == 0:
            print(f"seed {seed}, {time.monotonic() - began:.0f} s", flush=True)
        error = fault(base, scenario, alone, seen)
        if error is None:
            continue
        kind = kind_of(error)
        kinds[kind] += 1
        print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
        if kinds.total() <= shrinking:
            small = shrink(scenario, lambda s: kind_of(fault(base, s, alone)) == kind)  # noqa: B023
            print(f"  shrunk: {fault(base, small, alone)}\n  {small}", flush=True)
    print(f"{len(seeds)} schedules in {time.monotonic() - began:.0f} s: {dict(kinds)}; {seen}")
    return kinds.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--shrink", type=int, default=3, help="how many faults to shrink")
    parser.add_argument("--alone", action="store_true", help="not against vLLM's scheduler")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = base_config(make_checkpoint(Path(folder) / "tiny", TINY))
    logging.disable(logging.ERROR)
    seeds = range(args.seed, args.seed + args.schedules)
    faults = soak(base, seeds, args.shrink, args.alone)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
