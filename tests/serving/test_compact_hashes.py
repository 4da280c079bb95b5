"""Names of compact blocks, on vLLM's own requests; and the rows that the scheduler lends."""

from dataclasses import replace

import pytest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from vllm_dpp.serving.engine.compact_hashes import CompactHashes
from vllm_dpp.serving.engine.deferred_rows import DeferredRows
from vllm_dpp.serving.engine.scheduler import _name_of
from vllm_dpp.serving.plan import MediaSpan, build_plan
from vllm_dpp.serving.settings import ServingSettings

SIZE, START, LENGTH, END = 4, 6, 30, 9
TOKENS = [1, 2, 3, 4, 5, 6, *[50] * LENGTH, 7, 8, END, 10, 11, 12, 13, 14, 15, 16]
"""46 tokens: the video ends a block at 36, the question ends at 39."""
SETTINGS = ServingSettings(prune_layer=2, turn_end_token_id=END)


def names(
    tokens: list[int] = TOKENS,
    *,
    ratio: float = 0.25,
    video: str = "a",
    salt: str | None = None,
    settings: ServingSettings = SETTINGS,
) -> list[bytes]:
    init_none_hash(sha256)
    feature = MultiModalFeatureSpec(
        data=None,
        modality="video",
        identifier=video,
        mm_position=PlaceholderRange(offset=START, length=LENGTH),
    )
    request = Request(
        request_id="r",
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        mm_features=[feature],
        cache_salt=salt,
        block_hasher=get_request_block_hasher(SIZE, sha256),
    )
    plan = build_plan(
        tokens,
        [MediaSpan(START, LENGTH, True)],
        retention_ratio=ratio,
        turn_end_token_id=END,
        block_size=SIZE,
    )
    hashes = CompactHashes(request, plan, SIZE, _name_of(settings))
    assert list(hashes) == hashes[:] == [hashes[i] for i in range(len(hashes))]
    assert len(hashes) == plan.compact_length(len(tokens)) // SIZE
    assert hashes[0] == request.block_hashes[0], "before the video the names are vLLM's own"
    assert len({*hashes, *request.block_hashes}) == len(hashes) + len(request.block_hashes) - 1
    with pytest.raises(IndexError):
        hashes[len(hashes)]
    return list(hashes)


@pytest.mark.parametrize(
    "other",
    [
        {"ratio": 0.5},
        {"video": "b"},
        {"salt": "mine"},
        {"settings": replace(SETTINGS, prune_layer=3)},
        {"settings": replace(SETTINGS, relevance_floor=0.5)},
        {"tokens": [*TOKENS[:36], 8, 8, *TOKENS[38:]]},  # another question
        {"tokens": [2, *TOKENS[1:]]},  # another beginning
    ],
    ids=lambda other: next(iter(other)),
)
def test_nothing_past_the_video_is_found_by_what_keeps_something_else(other: dict) -> None:
    assert not {*names()[1:]} & {*names(**other)[1:]}


@pytest.mark.parametrize(
    "settings",
    [
        replace(SETTINGS, min_retention_ratio=0.2),
        replace(SETTINGS, retention_ratio=0.9),  # what a request keeps is in its plan
        replace(SETTINGS, record_dir="somewhere"),
    ],
)
def test_settings_that_change_nothing_change_no_name(settings: ServingSettings) -> None:
    assert names(settings=settings) == names()


def test_ratios_that_keep_the_same_share_their_blocks() -> None:
    assert names(ratio=0.25) == names(ratio=0.26)


def test_what_follows_the_decision_point_changes_later_blocks_alone() -> None:
    longer = names([*TOKENS, 17, 18, 19, 20])
    assert longer[: len(names())] == names()
    changed = names([*TOKENS[:41], 99, *TOKENS[42:]])
    same = [a == b for a, b in zip(changed, names(), strict=True)]
    first = same.index(False)
    assert not any(same[first:]) and first >= 1 + 2, "the kept tokens keep their names"


def test_rows_are_lent_first_come_first_served() -> None:
    rows = DeferredRows(10)
    assert rows.lend("a", 6) and rows.held == {"a": 6}
    assert rows.lend("a", 4) and rows.held == {"a": 6}, "it may keep what it has"
    assert not rows.lend("long", 5)
    assert not rows.fits("short", 2), "nobody overtakes one that was refused in this step"
    assert rows.lend("a", 6), "but those that hold rows go on"
    rows.end_step()
    assert rows.lend("short", 2)
    rows.settle("a", 0)
    rows.end_step()
    assert rows.lend("long", 8) and not rows.lend("b", 1)
    assert rows.held == {"short": 2, "long": 8}
