"""The rules that the DPP is compared with."""

import pytest
import torch

pytest.importorskip("vllm")

from vllm.multimodal.video_prune.vidcom2 import compute_retention_mask  # noqa: E402

from vllm_dpp.bench.quality.selectors import SELECTORS  # noqa: E402
from vllm_dpp.bench.quality.selectors.dpp import CONFIGS  # noqa: E402
from vllm_dpp.pruning import PruningConfig, keep_indices  # noqa: E402
from vllm_dpp.pruning.video import VideoTokens  # noqa: E402

NUM_SLICES, CELLS = 8, 16


def video(num_kept: int, seed: int = 0) -> VideoTokens:
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(NUM_SLICES * CELLS, 32, generator=rng)
    later = torch.linspace(0, 1, len(features)) ** 2  # more relevant
    relevance = later * torch.rand(len(features), generator=rng)
    return VideoTokens(features, relevance, num_kept, NUM_SLICES)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("num_kept", [8, 11, 64, 127])
def test_exactly_as_many_tokens_ascending(name: str, num_kept: int) -> None:
    kept = SELECTORS[name](video(num_kept))
    assert kept.shape == (num_kept,) and kept.dtype == torch.int64
    assert (kept.diff() > 0).all()
    assert 0 <= kept[0] and kept[-1] < NUM_SLICES * CELLS


@pytest.mark.parametrize("name", ["random", "uniform", "attention", "dpp", "dpp-none"])
@pytest.mark.parametrize("num_kept", range(1, 8))
def test_fewer_tokens_than_slices(name: str, num_kept: int) -> None:
    assert len(SELECTORS[name](video(num_kept)).unique()) == num_kept


def test_attention_keeps_the_largest() -> None:
    tokens = video(10)
    kept = set(SELECTORS["attention"](tokens).tolist())
    relevance = tokens.raw_relevance
    assert relevance is not None
    dropped = [i for i in range(len(relevance)) if i not in kept]
    assert relevance[list(kept)].min() > relevance[dropped].max()


def test_random_is_of_the_question_and_spreads() -> None:
    first, again, other = (SELECTORS["random"](video(32, seed)).tolist() for seed in (1, 1, 2))
    assert first == again != other
    counts = torch.zeros(NUM_SLICES * CELLS)
    for seed in range(400):
        counts[SELECTORS["random"](video(32, seed))] += 1
    # Binomial with mean 100 and standard deviation 8.7.
    assert 60 < counts.min() and counts.max() < 140


@pytest.mark.parametrize("num_kept", [16, 32, 64])
def test_uniform_visits_every_slice_and_every_column(num_kept: int) -> None:
    """A plain stride of 8, 4 or 2 would see the same columns in every slice."""
    kept = SELECTORS["uniform"](video(num_kept))
    assert (kept // CELLS).bincount().tolist() == [num_kept // NUM_SLICES] * NUM_SLICES
    assert len((kept % 4).unique()) == 4


def test_vidcom2_is_vllms() -> None:
    tokens = video(40)
    mask = compute_retention_mask(tokens.features, (NUM_SLICES, 4, 4), 1, 1 - 40.5 / 128)
    assert SELECTORS["vidcom2"](tokens).tolist() == mask.nonzero().flatten().tolist()
    with pytest.raises(ValueError, match="a token of each of 8 slices"):
        SELECTORS["vidcom2"](video(7))


def test_dpp_is_the_products_with_its_default_settings() -> None:
    tokens = video(20)
    assert CONFIGS["dpp"] == PruningConfig()
    assert SELECTORS["dpp"](tokens).tolist() == keep_indices([tokens], PruningConfig())[0].tolist()
    chosen = {name: tuple(SELECTORS[name](tokens).tolist()) for name in CONFIGS}
    for one, other in [
        ("dpp-none", "dpp-softened"),
        ("dpp-positive", "dpp-negated"),
        ("dpp-softened", "dpp-negated"),
        ("dpp-4-equal", "dpp-4-relevance"),
        ("dpp-softened", "dpp-4-equal"),
        ("dpp-4-equal", "dpp-4-equal-none"),
    ]:
        assert chosen[one] != chosen[other], (one, other)
