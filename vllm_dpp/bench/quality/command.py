"""Does the answer survive? Methods that make videos cheaper, on questions with right answers.

``vllm-dpp bench quality --help`` lists the options. Every method answers the same questions about
the same mp4 files through vLLM, at the same share of LM prefill and KV.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from vllm_dpp.bench.provenance import one_line, provenance
from vllm_dpp.bench.quality import options as opt
from vllm_dpp.bench.quality import plot
from vllm_dpp.bench.quality.arms import FULL, Arm, make_arms, parse_method
from vllm_dpp.bench.quality.checkpoints import read_checkpoints
from vllm_dpp.bench.quality.pictures import draw_kept
from vllm_dpp.bench.quality.report import render
from vllm_dpp.bench.quality.results import pool, summarise
from vllm_dpp.bench.quality.runs import AnswerFile, Run, run_arms
from vllm_dpp.bench.quality.test_set import split_of
from vllm_dpp.quality.batches import TEST_SEEDS
from vllm_dpp.quality.evaluate import SPLITS, held_out_batches, score
from vllm_dpp.quality.model import load_model
from vllm_dpp.quality.questions import chance_levels
from vllm_dpp.quality.scene import SceneSpec

_FLOOR_VIDEOS = 96


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark. Returns 0.

    Raises:
        ValueError: an argument cannot be served.
    """
    arguments = sys.argv[1:] if argv is None else argv
    options = opt.parse(arguments)
    if options.plot:
        plot.require_matplotlib()
    checkpoints = read_checkpoints(options.models)
    methods = [parse_method(text) for text in dict.fromkeys(options.methods)]
    arms = make_arms(methods, options.budgets, checkpoints[0].num_layers)
    for text in (*options.against, *options.draw):
        parse_method(text)  # one that does not run is left out, but a wrong name is an error
    against = [name for name in options.against if name in options.methods]
    drawn = _drawn(arms, against) if options.pictures else []
    if options.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the engines' processes
    options.output.mkdir(parents=True, exist_ok=True)
    splits = []
    for split in options.splits:
        runs = [Run(own, split, options.per_kind, tuple(options.kinds)) for own in checkpoints]
        file = AnswerFile(options.output / "answers.jsonl")
        for run in runs:
            run_arms(run, arms, file)
        splits.append(_summary(runs, arms, file, against))
        if drawn:
            path = options.output / f"kept-{split}.png"
            draw_kept(runs[0], drawn, range(options.pictures), path)
    document: dict[str, Any] = {
        "provenance": provenance(opt.MODULE, arguments),
        "weights": [own.weights for own in checkpoints],
        "splits": splits,
    }
    text = render(document)
    print(one_line(document["provenance"]) + "\n\n" + text)
    (options.output / "quality.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.output / "quality.md").write_text(text)
    if options.plot:
        plot.draw(document, options.draw, options.output / "quality.png")
    return 0


def _drawn(arms: list[Arm], against: list[str]) -> list[Arm]:
    """The smallest budget of the first method that chooses tokens."""
    choosing = [arm for arm in arms if arm.method.selector]
    for name in against:
        own = [arm for arm in choosing if arm.method.name == name]
        if own:
            return own[-1:]
    raise ValueError("--pictures are of a SELECTOR@K that is among --methods and --against")


def _summary(
    runs: list[Run], arms: list[Arm], file: AnswerFile, against: list[str]
) -> dict[str, Any]:
    """One test set; with chance levels and floors, where it is of a split of the task."""
    test_set, split = runs[0].test_set(), runs[0].split
    wanted = [(arm.method.name, arm.budget) for arm in arms]
    answers = [{key: found[key] for key in wanted} for found in (file.read(run) for run in runs)]
    pooled = pool(split, test_set.kinds, test_set.groups, answers)
    summary = summarise(pooled, against)
    spec = SPLITS.get(split_of(split))
    if spec is None:  # long videos are for nothing but vLLM
        return summary
    return summary | {
        "chance": chance_levels(spec, range(TEST_SEEDS.stop - 10_000, TEST_SEEDS.stop)),
        "floors": [_floors(run, spec) for run in runs],
    }


def _floors(run: Run, spec: SceneSpec) -> Mapping[str, Mapping[str, float]]:
    """By layer K, accuracy by kind with all of the video dropped before K, in plain PyTorch."""
    model, _ = load_model(run.checkpoint.folder)
    batches = held_out_batches(spec, _FLOOR_VIDEOS)
    found = score(model, batches, floors=True)
    depth = max(found)
    return {
        FULL if layer == depth else str(layer): {
            kind: round(own.accuracy, 4) for kind, own in scores.items() if kind in run.kinds
        }
        for layer, scores in sorted(found.items())
    }
