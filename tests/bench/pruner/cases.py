"""Small videos that the tests of the pruner benchmark share."""

import torch

from vllm_dpp.bench.pruner.problem import Case, Problem, make_problem
from vllm_dpp.pruning import PruningConfig

SMALL = Case(dim=96, num_segments=4, tokens_per_segment=48, kept_per_segment=12)


def problem_of(case: Case = SMALL, seed: int = 0, **settings) -> Problem:
    return make_problem(
        case,
        seed=seed,
        dtype=torch.float32,
        device=torch.device("cpu"),
        settings=PruningConfig(**settings),
    )
