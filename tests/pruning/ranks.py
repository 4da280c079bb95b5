"""What the ranks of test_sharded.py run: fresh processes load it by name."""

from dataclasses import replace

import torch
import torch.distributed as dist

from vllm_dpp.pruning import PruningConfig, keep_indices

from .helpers import ALL_CONFIGS, random_video

VIDEOS = [
    random_video(0, num_slices=8, num_kept=13),
    random_video(1, num_slices=1, num_kept=3),  # fewer segments than ranks
    random_video(2, num_slices=7, tokens_per_slice=9, num_kept=30),
    random_video(3, num_kept=0),
    random_video(4, num_slices=7, num_tail=8),  # the last slice is gone, the one before cut short
]


def select_on_rank(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    for config in [*ALL_CONFIGS, PruningConfig(segment_by="slices", slices_per_segment=1)]:
        together = keep_indices(VIDEOS, config, group=dist.group.WORLD)
        for mine, alone in zip(together, keep_indices(VIDEOS, config), strict=True):
            assert torch.equal(mine, alone), config
        # Inputs that are not quite the same must not make ranks disagree.
        config = replace(config, relevance_floor=0.1 + 0.05 * rank)
        together = keep_indices(VIDEOS, config, group=dist.group.WORLD)
        gathered: list = [None] * num_ranks
        dist.all_gather_object(gathered, [keep.tolist() for keep in together])
        assert all(kept == gathered[0] for kept in gathered), config
        assert [len(set(kept)) for kept in gathered[0]] == [v.num_kept for v in VIDEOS]
    dist.destroy_process_group()
