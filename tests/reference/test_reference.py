"""The layer loop and the choice of tokens, against transformers' own forward pass."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.reference import Prompt, Reference
from tests.reference.chats import CHATS
from vllm_dpp.pruning import PruningConfig
from vllm_dpp.serving.settings import ServingSettings, Similarity

Chat = Callable[[str], Prompt]
K = 3


def most_relevant(
    features: Tensor, raw_relevance: Tensor | None, num_kept: int, *of_video: int
) -> list[int]:
    return sorted(raw_relevance.topk(num_kept).indices.tolist())


def everything(prompt: Prompt) -> list[list[int]]:
    return [list(range(item.length)) for item in prompt.videos]


def model_inputs(prompt: Prompt) -> dict[str, Any]:
    """What transformers' own forward takes for this prompt, positions aside."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([prompt.token_ids])}
    for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        items = [item for item in prompt.media if item.modality == modality]
        if items:
            inputs[pixels] = torch.cat([item.pixel_values for item in items])
            inputs[f"{modality}_grid_thw"] = torch.tensor([item.grid_thw for item in items])
    return inputs


def transformers_forward(reference: Reference, prompt: Prompt, **options: Any) -> Any:
    positions = reference.network.positions(prompt, 0)[:, None]
    return reference.network.model(
        **model_inputs(prompt), position_ids=positions, use_cache=False, **options
    )


@pytest.mark.parametrize("name", CHATS)
def test_without_pruning_the_logits_are_those_of_transformers(
    reference: Reference, chat: Chat, name: str
) -> None:
    prompt = chat(name)
    expected = transformers_forward(reference, prompt).logits[0]
    actual = reference.logits(prompt, [], K, everything(prompt))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prune_layer", [0, 3, 5])
@pytest.mark.parametrize("name", ["video", "two turns"])
def test_the_upper_layers_are_transformers_on_the_kept_rows(
    reference: Reference, chat: Chat, name: str, prune_layer: int
) -> None:
    """The same two stacks, each run by transformers: one over all rows, one over those kept."""
    prompt = chat(name)
    keep = [list(range(1, video.length, 3)) for video in prompt.videos]
    dropped = {
        video.start + index
        for video in prompt.videos
        for index in range(video.length)
        if index % 3 != 1
    }
    rows = [row for row in range(len(prompt.token_ids)) if row not in dropped]

    forward = transformers_forward(reference, prompt, output_hidden_states=True)
    model = reference.network.model
    decoder = model.model.language_model
    layers = decoder.layers
    try:
        decoder.layers = layers[prune_layer:]
        upper = decoder(
            inputs_embeds=forward.hidden_states[prune_layer][:, rows],
            position_ids=reference.network.positions(prompt, 0)[:, None, rows],
            use_cache=False,
        )
    finally:
        decoder.layers = layers
    expected = model.lm_head(upper.last_hidden_state)[0]

    actual = reference.logits(prompt, [], prune_layer, keep)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_pruning_at_layer_0_is_a_shorter_prompt(reference: Reference, chat: Chat) -> None:
    prompt = chat("video")
    (video,) = prompt.videos
    keep = [0, 5, 6, 33, 63]
    rows = [*range(video.start), *(video.start + index for index in keep)]
    rows += range(video.end, len(prompt.token_ids))
    media = reference.network.media_embeddings(prompt)
    shorter = reference.network.model(
        inputs_embeds=reference.network.embeddings(prompt, [], media)[None, rows],
        position_ids=reference.network.positions(prompt, 0)[:, None, rows],
        use_cache=False,
    )
    actual = reference.logits(prompt, [], 0, [keep])
    torch.testing.assert_close(actual, shorter.logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("prune_layer", [0, 1, 4])
def test_relevance_is_the_attention_of_the_layer_below(
    reference: Reference, chat: Chat, prune_layer: int
) -> None:
    """Full attention probabilities, renormalised over one video, are a softmax over it alone."""
    prompt = chat("two turns")
    result = reference.run(
        prompt, prune_layer=prune_layer, retention_ratio=0.25, max_tokens=1, select=most_relevant
    )
    forward = transformers_forward(
        reference, prompt, output_attentions=True, output_hidden_states=True
    )
    attention = forward.attentions[max(prune_layer - 1, 0)][0]
    for plan, features, relevance in zip(
        result.plans, result.features, result.raw_relevance, strict=True
    ):
        video = slice(plan.start, plan.start + plan.length)
        weights = attention[:, list(plan.question), video]
        expected = (weights / weights.sum(dim=-1, keepdim=True)).mean(dim=(0, 1))
        torch.testing.assert_close(relevance, expected, atol=1e-6, rtol=1e-5)
        assert len(features) == plan.length - plan.num_tail


@pytest.mark.parametrize("similarity", get_args(Similarity))
def test_by_what_tokens_are_compared(
    reference: Reference, chat: Chat, similarity: Similarity
) -> None:
    prompt, settings = chat("video"), ServingSettings(similarity=similarity)
    result = reference.run(
        prompt, prune_layer=K, retention_ratio=0.25, max_tokens=1, settings=settings
    )
    forward = transformers_forward(reference, prompt, output_hidden_states=True)
    (video,) = prompt.videos
    entered, hidden = (forward.hidden_states[layer][0, video.start : video.end] for layer in (0, K))
    if similarity == "both":
        of_entered, of_hidden = (
            torch.cosine_similarity(x[:, None], x, dim=2) for x in (entered, hidden)
        )
        found = result.features[0] @ result.features[0].T
        torch.testing.assert_close(found, 0.9 * of_entered + 0.1 * of_hidden, atol=1e-5, rtol=0)
    else:
        expected = entered if similarity == "embeddings" else hidden
        torch.testing.assert_close(result.features[0], expected, atol=1e-5, rtol=0)


def test_nothing_behind_the_decision_point_changes_the_choice(
    reference: Reference, chat: Chat
) -> None:
    prompt = chat("two turns")

    def choice(changed: int | None) -> tuple[list[list[int]], Tensor]:
        token_ids = list(prompt.token_ids)
        if changed is not None:
            token_ids[changed] = (token_ids[changed] + 1) % 200
        result = reference.run(
            dataclasses.replace(prompt, token_ids=tuple(token_ids)),
            prune_layer=K,
            retention_ratio=0.25,
            max_tokens=1,
            select=most_relevant,
        )
        return result.keep[:1], result.raw_relevance[0]

    first = prompt.videos[0]
    decision_point = prompt.token_ids.index(prompt.turn_end_token_id, first.end) + 1
    keep, relevance = choice(None)
    keep_after, relevance_after = choice(decision_point)
    assert keep_after == keep
    torch.testing.assert_close(relevance_after, relevance, atol=1e-6, rtol=0)

    _, relevance_before = choice(decision_point - 2)
    assert (relevance_before - relevance).abs().max() > 1e-5


def test_the_selection_sees_features_relevance_and_counts(reference: Reference, chat: Chat) -> None:
    prompt = chat("two turns")
    calls = []

    def select(features: Tensor, relevance: Tensor, num_kept: int, *of_video: int) -> Sequence[int]:
        assert relevance.shape == features.shape[:1]
        calls.append((tuple(features.shape), num_kept, *of_video))
        return list(range(num_kept))

    result = reference.run(
        prompt, prune_layer=K, retention_ratio=0.25, max_tokens=1, block_size=8, select=select
    )
    # 48 tokens, 2 of them a tail, keep 12 of 46: 34 dropped, down to 32. Of 24 tokens 7 are a tail;
    # 4 of 17 are kept: 13 dropped, down to 8. Of the last slices 10 of 12 are left, and 1 of 8.
    assert calls == [((46, 512), 14, 4, 2, 10), ((17, 512), 9, 3, 7, 1)]
    assert result.keep == [[*range(14), 46, 47], [*range(9), *range(17, 24)]]


def test_a_video_with_nothing_behind_it_has_no_relevance(reference: Reference, chat: Chat) -> None:
    prompt = chat("video")
    cut = dataclasses.replace(prompt, token_ids=prompt.token_ids[: prompt.videos[0].end])
    seen = []

    def select(features: Tensor, relevance: None, num_kept: int, *of_video: int) -> Sequence[int]:
        seen.append(relevance)
        return range(num_kept)

    result = reference.run(cut, prune_layer=K, retention_ratio=0.5, max_tokens=1, select=select)
    assert seen == result.raw_relevance == [None]


def test_greedy_tokens_follow_from_the_whole_sequence(reference: Reference, chat: Chat) -> None:
    prompt = chat("video")
    result = reference.run(prompt, prune_layer=K, retention_ratio=1.0, max_tokens=5)
    longer = dataclasses.replace(prompt, token_ids=(*prompt.token_ids, *result.tokens))
    expected = transformers_forward(reference, longer).logits[0, -6:-1]
    torch.testing.assert_close(result.logprobs, expected.log_softmax(-1), atol=1e-5, rtol=0)
    assert result.tokens == expected.argmax(-1).tolist()


def test_forced_tokens_and_forced_keep_are_obeyed(reference: Reference, chat: Chat) -> None:
    prompt = chat("two turns")
    answer = [65, prompt.turn_end_token_id, 66, 10]

    def logprobs(keep: list[list[int]]) -> Tensor:
        result = reference.run(
            prompt,
            prune_layer=K,
            retention_ratio=0.25,
            max_tokens=4,
            forced_tokens=answer,
            forced_keep=keep,
        )
        assert (result.tokens, result.keep) == (answer, keep)
        return result.logprobs

    keep = [[0, 7, 47], [3, 23]]
    at_once = reference.logits(prompt, answer[:-1], K, keep)[-4:].log_softmax(-1)
    torch.testing.assert_close(logprobs(keep), at_once, atol=1e-5, rtol=0)
    other_first = logprobs([[0, 8, 47], [3, 23]])
    assert (other_first - at_once).abs().amax(dim=-1).min() > 1e-3
    with pytest.raises(ValueError, match="ascending"):
        logprobs([[7, 0, 47], [3, 23]])
    with pytest.raises(ValueError, match="ascending"):
        logprobs([[0, 7, 48], [3, 23]])


def test_the_default_selection_is_called_with_the_settings(
    reference: Reference, chat: Chat
) -> None:
    prompt = chat("two videos")

    def keep(**settings: Any) -> list[list[int]]:
        return reference.run(
            prompt,
            prune_layer=K,
            retention_ratio=0.25,
            max_tokens=1,
            settings=PruningConfig(**settings),
        ).keep

    kept = keep()
    assert [len(indices) for indices in kept] == [12, 5]
    assert kept == keep(relevance_sign="positive") != keep(relevance_sign="negative")


def test_float64_agrees_with_float32(checkpoint: Any, reference: Reference, chat: Chat) -> None:
    prompt = chat("two videos")
    keep = [[0, 1, 17], [4, 5]]
    double = Reference(checkpoint, dtype=torch.float64).logits(prompt, [], K, keep)
    single = reference.logits(prompt, [], K, keep)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=2e-5, rtol=0)
    assert (single.double() - double).abs().max() > 0


@pytest.mark.parametrize("prune_layer", [-1, 6])
def test_prune_layer_outside_the_decoder_is_refused(
    reference: Reference, chat: Chat, prune_layer: int
) -> None:
    with pytest.raises(ValueError, match="prune_layer"):
        reference.run(chat("text"), prune_layer=prune_layer, retention_ratio=1.0, max_tokens=1)
