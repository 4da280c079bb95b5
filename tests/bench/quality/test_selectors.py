"""The settings that the arms stand for, and the peers' rules."""

import pytest
import torch

pytest.importorskip("vllm")

from vllm.multimodal.video_prune import evs, vidcom2  # noqa: E402

from vllm_dpp.bench.quality import stock_rules  # noqa: E402
from vllm_dpp.bench.quality.selectors import SELECTORS  # noqa: E402
from vllm_dpp.pruning import keep_indices  # noqa: E402
from vllm_dpp.pruning.rules import RULES  # noqa: E402
from vllm_dpp.pruning.video import VideoTokens  # noqa: E402
from vllm_dpp.serving.settings import ServingSettings  # noqa: E402

NUM_SLICES, CELLS = 8, 16


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("evs", "vidcom2"):
        monkeypatch.setitem(RULES, name, RULES["dpp"])  # so that it is taken out again
    stock_rules.register()


def video(num_kept: int) -> VideoTokens:
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_SLICES * CELLS, 32, generator=rng)
    later = torch.linspace(0, 1, len(features)) ** 2  # more relevant
    relevance = later * torch.rand(len(features), generator=rng)
    return VideoTokens(features, relevance, num_kept, NUM_SLICES)


@pytest.mark.parametrize("num_kept", [8, 20, 127])
def test_every_selector_is_a_servers_settings_and_they_differ(num_kept: int) -> None:
    chosen = {}
    for name, settings in SELECTORS.items():
        config = ServingSettings.from_mapping(settings)
        (kept,) = keep_indices([video(num_kept)], config)
        assert len(kept) == num_kept and (kept.diff() > 0).all(), name
        chosen[name] = tuple(kept.tolist())
    if num_kept == 20:
        chosen.pop("dpp-scene-equal")  # shots of equal length here
        chosen.pop("dpp")  # one segment, where there are so few slices
        chosen.pop("dpp-hidden-0.6")  # other features, which are given here
        chosen.pop("dpp-embeddings-0.6")
        chosen.pop("dpp-all-slices-0.6")  # the same where the question is read
        assert len(set(chosen.values())) > len(chosen) - 3, chosen


def test_the_default_is_the_products() -> None:
    assert ServingSettings.from_mapping(SELECTORS["dpp"]) == ServingSettings()


def test_vidcom2_is_vllms() -> None:
    tokens = video(40)
    mask = vidcom2.compute_retention_mask(tokens.features, (NUM_SLICES, 4, 4), 1, 1 - 40.5 / 128)
    assert stock_rules.keep_vidcom2(tokens).tolist() == mask.nonzero().flatten().tolist()
    with pytest.raises(ValueError, match="a token of each of 8 slices"):
        stock_rules.keep_vidcom2(video(7))


@pytest.mark.parametrize("num_kept", [16, 40, 127])
def test_evs_is_vllms(num_kept: int) -> None:
    tokens = video(num_kept)
    rate = 1 - num_kept / 128
    mask = evs.compute_retention_mask(tokens.features, (NUM_SLICES, 4, 4), 1, rate - 1e-9)
    kept = stock_rules.keep_evs(tokens).tolist()
    assert kept == mask.nonzero().flatten().tolist() and len(kept) == num_kept
    assert kept[:CELLS] == list(range(CELLS))
    with pytest.raises(ValueError, match="keeps the 16 tokens of the first slice"):
        stock_rules.keep_evs(video(15))
