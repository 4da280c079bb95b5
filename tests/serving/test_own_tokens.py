"""A video's own tokens among the text between its slices, against a plain loop."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm_dpp.serving.plan import MediaSpan, build_plan  # noqa: E402
from vllm_dpp.serving.step import ScheduledRequest, lay_out  # noqa: E402
from vllm_dpp.serving.worker.own_tokens import going_up, own_rows, own_tokens  # noqa: E402

CPU = torch.device("cpu")
END, TEXT, PAD = 9, 1, 5


@given(st.integers(0, 7), st.permutations([True] * 12 + [False] * 30), st.sampled_from([None, 4]))
def test_what_goes_up_is_all_text_and_the_kept_tokens(before, is_text, block_size):
    tokens = [TEXT] * before + [PAD] * len(is_text) + [TEXT, END]
    media = [MediaSpan(before, len(is_text), True, num_text=sum(is_text))]
    plan = build_plan(
        tokens, media, retention_ratio=0.3, turn_end_token_id=END, block_size=block_size
    )
    layout = lay_out([ScheduledRequest("a", plan, 0, len(tokens))], 1000)
    (part,) = layout.ranges
    (video,) = part.turn.videos
    places = np.flatnonzero(~np.array(is_text))
    own = own_tokens(places, part, video, CPU)
    start, end = part.place_of(video)
    expected = [start + i for i, text in enumerate(is_text) if not text][: video.length]
    assert own.tolist() == expected
    flags = np.zeros(part.turn.length, bool)
    flags[start : start + len(is_text)] = ~np.array(is_text)[: part.turn.length - start]
    assert own_rows(torch.from_numpy(flags), part, video).tolist() == expected
    rng = np.random.default_rng(before)
    kept = np.sort(rng.choice(video.length, video.num_kept, replace=False))
    up = going_up(part, video, own, torch.from_numpy(kept)).tolist()
    lost = {expected[i] for i in set(range(video.length)) - set(kept.tolist())}
    assert up == [i for i in range(start, end) if i not in lost]
    assert len(up) == video.num_kept + video.num_text
    assert layout.num_compact_rows == len(tokens) - len(lost)


def test_a_video_without_text_is_a_slice() -> None:
    tokens = [TEXT] * 3 + [PAD] * 20 + [END]
    plan = build_plan(
        tokens,
        [MediaSpan(3, 20, True)],
        retention_ratio=0.25,
        turn_end_token_id=END,
        block_size=None,
    )
    (part,) = lay_out([ScheduledRequest("a", plan, 0, 24)], 1000).ranges
    (video,) = part.turn.videos
    own = own_tokens(None, part, video, CPU)
    assert own == slice(0, 20)
    assert going_up(part, video, own, torch.tensor([1, 4])).tolist() == [1, 4]
