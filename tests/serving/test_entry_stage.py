"""The stage before the decoder, part by part: ratios, placeholders, places and their transport."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from vllm_dpp.pruning import VideoTokens, keep_indices
from vllm_dpp.serving.cost_model import (
    KEPT_OF_ENTERED,
    kv_share,
    two_stage_ratios,
)
from vllm_dpp.serving.front.shares import spread
from vllm_dpp.serving.request_plan import RequestOptions
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.serving.worker.entry_state import EntryStateMixin
from vllm_dpp.serving.worker.models import entry
from vllm_dpp.serving.worker.models.entry import (
    EncodedVideo,
    EntryStage,
    TextBetween,
    prompt_positions,
)
from vllm_dpp.serving.worker.models.qwen2_5_vl import DPPQwen2_5_VLForConditionalGeneration
from vllm_dpp.serving.worker.models.timed_media import provide_positions
from vllm_dpp.serving.worker.models.timed_slices import TimedSlices

WIDTH, DEEP = 24, 8
SETTINGS = ServingSettings(prune_layer=4, entry_ratio=0.5)
MOST_ROWS = 10_000


@given(share=st.floats(0.01, 1), layer=st.integers(0, 27), fraction=st.floats(0.05, 1))
def test_two_stages_leave_the_share(share: float, layer: int, fraction: float) -> None:
    entering, kept = two_stage_ratios(share, layer, 28, fraction)
    assert 0 < entering <= 1 and 0 < kept <= 1
    assert entering * kv_share(layer, 28, kept) == pytest.approx(share)
    assert kept == fraction or (entering == 1 and kept > fraction)


@given(share=st.floats(0.01, 1), layer=st.integers(0, 27))
def test_one_number_keeps_a_third_of_what_enters(share: float, layer: int) -> None:
    assert two_stage_ratios(share, layer, 28) == two_stage_ratios(share, layer, 28, KEPT_OF_ENTERED)


@given(one=st.floats(0.01, 1), other=st.floats(0.01, 1), layer=st.integers(0, 27))
def test_a_larger_share_lets_in_and_keeps_no_less(one: float, other: float, layer: int) -> None:
    less, more = (two_stage_ratios(share, layer, 28) for share in sorted((one, other)))
    assert more[0] >= less[0] - 1e-9 and more[0] * more[1] >= less[0] * less[1] - 1e-9


def test_one_number_sets_both_ratios() -> None:
    settings = ServingSettings(prune_layer=14, video_share=0.2).with_ratios(28)
    assert settings.entry_ratio == pytest.approx(0.3) and settings.retention_ratio == 1 / 3
    assert settings == settings.with_ratios(28)
    assert RequestOptions().settings(settings).relevance == "question"
    large = ServingSettings(prune_layer=14, video_share=0.6).with_ratios(28)
    assert large.entry_ratio == pytest.approx(0.9) and large.retention_ratio == 1 / 3
    assert large.reads_question, "of requests that ask for less"
    assert RequestOptions().settings(large).relevance == "none"
    assert RequestOptions(retention_ratio=0.4).settings(large).relevance == "question"
    asked = replace(large, default_relevance="question")
    assert RequestOptions().settings(asked).relevance == "question"
    by_attention = ServingSettings(prune_layer=14, video_share=0.6, rule="attention")
    assert RequestOptions().settings(by_attention.with_ratios(28)).relevance == "question"
    never = ServingSettings(prune_layer=14, video_share=0.2, relevance="none").with_ratios(28)
    assert RequestOptions().settings(never).relevance == "none"
    with pytest.raises(ValueError, match="default_relevance 'question' needs relevance"):
        ServingSettings(relevance="none", default_relevance="question")
    with pytest.raises(ValueError, match="rule 'attention' needs default_relevance"):
        ServingSettings(rule="attention", default_relevance="none")
    assert ServingSettings(prune_layer=14, video_share=1).with_ratios(28).retention_ratio == 1
    for more in ({"entry_ratio": 0.5}, {"retention_ratio": 0.5}):
        with pytest.raises(ValueError, match=f"video_share sets {next(iter(more))}"):
            ServingSettings(video_share=0.3, **more)
    for wrong in (0, 1.1, "half", True):
        with pytest.raises(ValueError, match="video_share must be a number"):
            ServingSettings(video_share=wrong)
    with pytest.raises(ValueError, match="compares whole slices"):
        ServingSettings(entry_ratio=0.5, rule="change")
    with pytest.raises(ValueError, match="entry_rule must be one of 'dpp', 'change'"):
        ServingSettings(entry_rule="attention")


def encoded(seed: int, grid: tuple[int, int, int], entering: int, **more: Any) -> EncodedVideo:
    """A video whose encoder returns `DEEP` columns beside those of layer 0."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randn(int(np.prod(grid)), WIDTH + DEEP, generator=rng)
    origins = more.pop("origins", np.arange(3 * grid[0]).reshape(-1, 3) * 25)
    return EncodedVideo(
        tokens.to(more.pop("dtype", torch.float32)), grid, entering, origins, **more
    )


def chosen_of(video: EncodedVideo) -> torch.Tensor:
    tokens = VideoTokens(video.tokens[:, :WIDTH], None, video.num_entering, video.grid[0])
    (chosen,) = keep_indices([tokens], SETTINGS.entry_config)
    return chosen


def places_of(video: EncodedVideo) -> torch.Tensor:
    """[N, 4], by a plain loop: positions of every token, and 1 + its index."""
    _, rows, columns = video.grid
    found = []
    for number, (t, h, w) in enumerate(video.origins.tolist()):
        cells = [(row, column) for row in range(rows) for column in range(columns)]
        first = number * len(cells) + 1
        found += [(t, h + r, w + c, first + i) for i, (r, c) in enumerate(cells)]
    return torch.tensor(found)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> EntryStage:
    monkeypatch.setattr(entry, "agree", lambda indices: indices)  # there are no other ranks
    return EntryStage(SETTINGS, WIDTH, WIDTH + DEEP, MOST_ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_find_their_places(dtype: torch.dtype, stage: EntryStage) -> None:
    """Through the dtype of the features, past 256 squared, beside an image."""
    long = encoded(0, (3000, 1, 2), 77, dtype=dtype)
    wide = encoded(1, (2, 2, 300), 500, dtype=dtype)
    whole = encoded(2, (1, 3, 3), 9, dtype=dtype)
    assert long.origins.max() > 2**16
    outputs = stage.select([long, wide, whole])
    assert outputs[2] is whole.tokens

    text = 5
    rows = [text, len(outputs[0]), text, len(outputs[1]), len(outputs[2]), text]
    kinds = torch.repeat_interleave(torch.tensor([0, 1, 0, 1, 1, 0]).bool(), torch.tensor(rows))
    plain = stage.unpack(outputs, kinds)
    assert [item.shape[1] for item in plain] == [WIDTH + DEEP] * 3
    given = torch.full((3, sum(rows) + 4), 1000)
    placed, places = stage.place(given), stage.take_places()
    assert (given == 1000).all(), "the runner's own stay what they are"
    assert places is not None and places.shape == (sum(rows), 4)
    assert (placed[:, -4:] == 1000).all(), "padding rows"
    assert (placed[:, : sum(rows)][:, ~kinds] == 1000).all(), "text stays"
    first = rows[0]
    for video, item, start in (
        (long, plain[0], first),
        (wide, plain[1], first + rows[1] + rows[2]),
    ):
        chosen = chosen_of(video)
        assert torch.equal(item, video.tokens[chosen])
        expected = places_of(video)[chosen]
        end = start + len(chosen)
        assert torch.equal(placed[:, start:end], expected[:, :3].T + 1000)
        assert torch.equal(places[start:end], expected)
    assert stage.take_places() is None, "places are taken once"
    stage.forget()
    assert torch.equal(stage.place(given), given), "places are of one step"
    assert stage.place(given).data_ptr() == placed.data_ptr(), "a graph finds them again"


def test_drafters_get_what_entered_without_its_places(stage: EntryStage) -> None:
    """On the V2 runner; the decoder's own path gets it with them (`test_patches`)."""
    whole, part = torch.randn(7, WIDTH + DEEP), torch.randn(5, WIDTH + DEEP)
    packed = torch.cat([part, torch.ones(5, 12)], dim=1)
    is_multimodal = torch.ones(12, dtype=torch.bool)

    class Stock:
        def gather_mm_embeddings(self, batch: Any, lookahead: int) -> Any:
            assert (batch, lookahead) == ("batch", 1)
            return [packed, whole], is_multimodal

    class State(EntryStateMixin, Stock):
        model = SimpleNamespace(entry=stage)

    found, mask = State().gather_mm_embeddings("batch", 1)  # type: ignore[arg-type]
    assert torch.equal(found[0], part) and torch.equal(found[1], whole) and mask is is_multimodal


def test_positions_that_count_tokens_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "agree", lambda indices: indices)
    stage, video = EntryStage(SETTINGS, WIDTH, WIDTH + DEEP, 0), encoded(0, (3, 2, 2), 7)
    (output,) = stage.select([video])
    stage.unpack([output], torch.ones(7, dtype=torch.bool))
    positions = torch.arange(7)
    assert stage.place(positions) is positions
    places = stage.take_places()
    assert places is not None and (places[:, 3] - 1).tolist() == chosen_of(video).tolist()


SLICE_START, SLICE_END, PAD = 7, 8, 9
TIMES = st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5)


@given(times=TIMES, rows=st.integers(1, 3), columns=st.integers(1, 3), data=st.data())
def test_text_stands_between_what_enters_of_its_slices(
    times: list[list[int]], rows: int, columns: int, data: st.DataObject
) -> None:
    """As in the whole video, of which the other tokens are taken out."""
    cells = rows * columns
    grid, size = (len(times), rows, columns), len(times) * cells
    whole: list[int] = []  # the prompt's tokens, and after PAD which of the video's they are
    for number, time in enumerate(times):
        whole += [*time, SLICE_START]
        whole += [PAD + 1 + number * cells + i for i in range(cells)] + [SLICE_END]
    text = [token for token in whole if token < PAD]
    slices = TimedSlices.of(text, grid, SLICE_END)
    config = SimpleNamespace(
        video_token_id=PAD,
        vision_start_token_id=SLICE_START,
        vision_end_token_id=SLICE_END,
        vision_config=SimpleNamespace(spatial_merge_size=1),
    )
    is_own = np.array(whole) > PAD
    prompt = np.where(is_own, PAD, whole).tolist()
    feature = SimpleNamespace(
        modality="video",
        data={"video_grid_thw": SimpleNamespace(data=torch.tensor(grid))},
        mm_position=SimpleNamespace(offset=0),
    )
    stock, delta = Qwen3VLForConditionalGeneration._get_mrope_input_positions(
        [*prompt, 0], [feature], config
    )
    positions = slices.whole(is_own, grid)
    assert positions.tolist() == stock[:, :-1].tolist()
    assert slices.span == int(stock[0, -1]) == len(prompt) + delta

    entering = data.draw(st.integers(1, size - 1)) if size > 1 else 1
    video = encoded(size, grid, entering, origins=slices.origins)
    embeddings = -torch.ones(len(text), WIDTH + DEEP) * (1 + torch.arange(len(text))[:, None])
    between = TextBetween(embeddings, slices.text, slices.tokens_before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "agree", lambda indices: indices)
        one = EntryStage(SETTINGS, WIDTH, WIDTH + DEEP, MOST_ROWS)
        (output,) = one.select([replace(video, text=between)])
    if entering == size:
        assert output is video.tokens, "whole, and its text is the prompt's"
        return
    chosen = set(chosen_of(video).tolist())
    (rows_,) = one.unpack([output], torch.ones(len(output), dtype=torch.bool))
    places = one.take_places()
    assert places is not None
    left = [i for i, token in enumerate(whole) if token < PAD or token - PAD - 1 in chosen]
    assert len(left) == len(output)
    assert places[:, :3].T.tolist() == positions[:, left].tolist()
    texts = iter(embeddings)
    for row, place, i in zip(rows_, places[:, 3].tolist(), left, strict=True):
        index = whole[i] - PAD - 1
        assert place == max(index + 1, 0)
        assert torch.equal(row, video.tokens[index] if index >= 0 else next(texts))


class StockPositions(SimpleNamespace):
    """vLLM's own rule, over grids that are given."""

    get_mrope_input_positions = Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions


class OurPositions(SimpleNamespace):
    """Ours, over the same."""

    placed_media = DPPQwen2_5_VLForConditionalGeneration.placed_media


GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))
MEDIA = st.lists(st.tuples(st.integers(0, 5), GRIDS, st.sampled_from([1.0, 0.4, 2.0, 1.5])))


@given(media=MEDIA, tail=st.integers(0, 4), data=st.data())
def test_positions_are_vllms_wherever_the_host_knows_them(
    media: list[tuple[int, tuple[int, int, int], float]], tail: int, data: st.DataObject
) -> None:
    """Of text always, and of media that enter whole; the others are at their video's start."""
    if not media and not tail:
        tail = 1
    whole, short, drawn, at, short_at = [], [], [], 0, 0
    keep: list[bool] = []
    for text, grid, step in media:
        size = int(np.prod(grid))
        entering = data.draw(st.integers(1, size))
        at, short_at = at + text, short_at + text
        whole.append((at, *grid, step))
        short.append((short_at, *grid, step))
        drawn.append((short_at, entering, entering == size))
        keep += [True] * text + [True] * entering + [False] * (size - entering)
        at, short_at = at + size, short_at + entering
    keep += [True] * tail
    stock = StockPositions(iter_mm_grid_thw=lambda features: whole)
    expected, delta = stock.get_mrope_input_positions([0] * (at + tail), [])
    ours = OurPositions(iter_mm_grid_thw=lambda features: short)
    places = [SimpleNamespace(offset=start, length=length) for start, length, _ in drawn]
    placed = ours.placed_media([], [SimpleNamespace(mm_position=place) for place in places])
    found, found_delta = prompt_positions(short_at + tail, placed)
    assert found_delta == delta + (at - short_at)
    expected = expected[:, torch.tensor(keep)]
    for start, entering, is_whole in drawn:
        if not is_whole:
            expected[:, start : start + entering] = expected[:, start : start + 1]
    assert torch.equal(found, expected)


def chat(**xargs: Any) -> Any:
    message = {"role": "user", "content": "Hello"}
    return ChatCompletionRequest(messages=[message], model="m", vllm_xargs=xargs)


def test_a_request_over_http_sets_both_stages() -> None:
    request = chat(dpp_video_share=0.2, dpp_record=1)
    spread(request, SETTINGS, 8)
    assert request.vllm_xargs == {"dpp_record": 1, "dpp_retention_ratio": 1 / 3}
    assert request.mm_processor_kwargs == {"dpp_entry_ratio": pytest.approx(0.3)}

    request = chat(dpp_video_share=0.6)
    spread(request, SETTINGS, 8)
    assert request.vllm_xargs == {"dpp_retention_ratio": 1 / 3, "dpp_relevance": "none"}
    request = chat(dpp_video_share=0.6)
    spread(request, replace(SETTINGS, rule="attention"), 8)
    assert request.vllm_xargs == {"dpp_retention_ratio": 1 / 3}
    request = chat(dpp_video_share=0.6, dpp_relevance="question")
    spread(request, SETTINGS, 8)
    assert request.vllm_xargs == {"dpp_retention_ratio": 1 / 3, "dpp_relevance": "question"}

    request = chat(dpp_entry_ratio=0.7, dpp_retention_ratio=1)
    request.mm_processor_kwargs = {"max_pixels": 9}
    spread(request, SETTINGS, 8)
    assert request.vllm_xargs == {"dpp_retention_ratio": 1}
    assert request.mm_processor_kwargs == {"max_pixels": 9, "dpp_entry_ratio": 0.7}

    untouched = chat(dpp_retention_ratio=0.5)
    spread(untouched, SETTINGS, 8)
    assert untouched.mm_processor_kwargs is None
    assert untouched.vllm_xargs == {"dpp_retention_ratio": 0.5}


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"dpp_video_share": 2}, "dpp_video_share must be a number in"),
        ({"dpp_entry_ratio": "half"}, "dpp_entry_ratio must be a number in"),
        ({"dpp_video_share": 0.5, "dpp_entry_ratio": 0.5}, "leave those out, or it"),
        ({"dpp_video_share": 0.5, "dpp_retention_ratio": 0.5}, "leave those out, or it"),
        ({"dpp_video_share": 0.5, "dpp_rule": "change"}, "compares whole slices"),
    ],
)
def test_contradictions_over_http(xargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spread(chat(**xargs), SETTINGS, 8)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [(0.5, "compares whole slices"), (0, r"mm_processor_kwargs: dpp_entry_ratio must be a number")],
)
def test_what_goes_to_the_processor_is_checked_likewise(ratio: float, message: str) -> None:
    request = chat(dpp_rule="change")
    request.mm_processor_kwargs = {"dpp_entry_ratio": ratio}
    with pytest.raises(ValueError, match=message):
        spread(request, SETTINGS, 8)


def test_an_endpoint_without_processor_arguments() -> None:
    request = CompletionRequest(prompt="Hello", vllm_xargs={"dpp_entry_ratio": 0.5})
    with pytest.raises(ValueError, match="takes no dpp_entry_ratio"):
        spread(request, SETTINGS, 8)


@pytest.mark.parametrize("yarn", [False, True], ids=["plain", "yarn"])
def test_more_positions_leave_those_that_were_known(yarn: bool) -> None:
    """Of the stock table the rows stay bit for bit, and the next ones are what stock would have."""
    more: dict[str, Any] = {"scaling_factor": 3.0} if yarn else {}
    section = [12, 10, 10]
    with set_current_vllm_config(VllmConfig()):
        ours = MRotaryEmbedding(
            64, 64, 64, 1e4, True, torch.float32, section, True, positions_factor=1, **more
        )
        known = ours.cos_sin_cache.clone()
        provide_positions(ours, 400)
    assert len(ours.cos_sin_cache) == 400
    assert torch.equal(ours.cos_sin_cache[: len(known)], known)
    angles = torch.outer(torch.arange(400.0), known_frequencies(known))
    expected = torch.cat([angles.cos(), angles.sin()], dim=-1) * ours.mscale
    torch.testing.assert_close(ours.cos_sin_cache, expected, atol=2e-3, rtol=0)


def known_frequencies(table: torch.Tensor) -> torch.Tensor:
    """Of a rotary table, by what one position turns."""
    cos, sin = table[1].chunk(2)
    return torch.atan2(sin, cos)
