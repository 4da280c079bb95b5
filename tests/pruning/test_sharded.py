"""Ranks are processes of their own, joined by gloo."""

import pytest
import torch.multiprocessing as mp

from tests.pruning.ranks import select_on_rank


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_agree_with_one_another_and_with_one_alone(tmp_path, num_ranks):
    mp.spawn(select_on_rank, (num_ranks, str(tmp_path)), nprocs=num_ranks)
