"""The fast path computes what transformers computes, and packing changes nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("cv2")

from tests.reference.media import MediaItem  # noqa: E402
from tests.reference.positions import mrope_positions  # noqa: E402
from vllm_dpp.quality import learner, network  # noqa: E402  (needs the modules above)
from vllm_dpp.quality.batches import Batch, BatchSize, draw_questions, make_batch  # noqa: E402
from vllm_dpp.quality.evaluate import held_out_films  # noqa: E402
from vllm_dpp.quality.film import FILM_FPS, NUM_SHOTS, SHOT  # noqa: E402
from vllm_dpp.quality.learner import (  # noqa: E402
    Heads,
    answer_step,
    decode,
    embed,
    to_tensors,
    word_to_end,
)
from vllm_dpp.quality.model import load_model, save_model  # noqa: E402
from vllm_dpp.quality.packing import (  # noqa: E402
    AFTER_VIDEO,
    NO_QUESTION,
    Chat,
    make_prefix,
    pack_chats,
    pack_positions,
    tokenize,
    tokenizer,
)
from vllm_dpp.quality.questions import KINDS, Question, make_questions  # noqa: E402
from vllm_dpp.quality.render import FPS, render, shrink  # noqa: E402
from vllm_dpp.quality.scene import DENSE, GRID, STANDARD, Cells, make_scene  # noqa: E402
from vllm_dpp.quality.words import ANSWERS  # noqa: E402
from vllm_dpp.toy.video import Frames  # noqa: E402

EQUAL = dict.fromkeys(KINDS, 1.0)
both_specs = pytest.mark.parametrize("spec", [STANDARD, DENSE], ids=["standard", "dense"])
all_sizes = pytest.mark.parametrize("cells", [(GRID, GRID), (2, 3)], ids=["whole", "smaller"])


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Any:
    folder = tmp_path_factory.mktemp("quality") / "model"
    save_model(model, tokenizer(), folder)
    return transformers.AutoProcessor.from_pretrained(folder)


def singly(questions: list[Question]) -> list[Chat]:
    return [(question,) for question in questions]


def processed(processor: Any, frames: Frames, text: str) -> Any:
    """What a user of transformers gives the model."""
    content = [{"type": "video"}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    metadata = {"fps": FPS, "total_num_frames": len(frames)}
    return processor(
        text=[prompt],
        videos=[frames],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )


@both_specs
@all_sizes
def test_patches_are_the_processors(processor: Any, spec: Any, cells: Cells) -> None:
    frames = shrink(render(make_scene(1, spec)), cells)
    theirs = processed(processor, frames, "where is the star?")["pixel_values_videos"]
    ours = network.patchify(torch.from_numpy(frames[None])).flatten(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@both_specs
@all_sizes
def test_tokens_and_positions_are_vllms(processor: Any, spec: Any, cells: Cells) -> None:
    scene = make_scene(1, spec)
    question = make_questions(scene)[0]
    theirs = processed(processor, shrink(render(scene), cells), question.text)
    pack = pack_chats([(question,)], 40, 1)
    count = int((pack.chat != NO_QUESTION).sum())
    ids = torch.from_numpy(pack.token_ids[:count])
    prefix = make_prefix(spec.num_steps, cells)
    ours = torch.cat([prefix.token_ids, ids])
    assert ours[:-1].tolist() == theirs["input_ids"][0].tolist()  # our last is the answer
    positions = pack_positions(prefix, torch.from_numpy(pack.offsets[None, : count - 1]))
    grid, seconds = theirs["video_grid_thw"][0].tolist(), float(theirs["second_per_grid_ts"][0])
    span = prefix.video
    item = MediaItem(
        "video", span.start, span.stop - span.start, torch.empty(0), tuple(grid), seconds
    )
    expected = mrope_positions(  # by vLLM's rule; transformers has another behind a video
        len(ours) - 1, [item], tokens_per_second=2, spatial_merge_size=2
    )
    torch.testing.assert_close(positions[:, 0], expected)


def test_a_films_positions_are_vllms() -> None:
    """Where four steps share one, since a film runs fast."""
    (batch,) = held_out_films(1)
    prefix, num_steps = batch.prefix, NUM_SHOTS * SHOT.num_steps
    assert len(batch.frames[0]) == 2 * num_steps
    pack = torch.from_numpy(batch.packs.offsets[:, :9])
    item = MediaItem(
        "video",
        prefix.video.start,
        prefix.video.stop - prefix.video.start,
        torch.empty(0),
        (num_steps, 2 * GRID, 2 * GRID),
        2 / FILM_FPS,
    )
    expected = mrope_positions(
        len(prefix.token_ids) + 9, [item], tokens_per_second=2, spatial_merge_size=2
    )
    torch.testing.assert_close(pack_positions(prefix, pack)[:, 0], expected)
    times = prefix.positions[0, prefix.video]
    assert int(times.max() - times.min()) == num_steps // 4


@all_sizes
def test_logits_are_the_models(processor: Any, model: Any, cells: Cells) -> None:
    scene = make_scene(3)
    questions = make_questions(scene)[::7]
    batch = make_batch([scene], [singly(questions)], BatchSize(1, 200, 24), cells)
    assert (batch.labels is None) == (cells != (GRID, GRID))
    packs = to_tensors(batch.packs, torch.device("cpu"))
    with torch.no_grad():
        patches = network.patchify(torch.from_numpy(batch.frames))
        video = network.encode_videos(model, patches, 1, cells)
        hidden = decode(model, video, packs, batch.prefix).questions
        for place, question in enumerate(questions):
            ours = network.final_logits(model, hidden[0, packs["ask_at"][0, place]])
            inputs = processed(processor, batch.frames[0], question.text)
            theirs = model(**inputs, position_ids=positions_of(question, cells)).logits[0, -1]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            assert theirs.std() > 0.1


def test_a_later_question_is_asked_as_a_chat_template_asks_it(processor: Any) -> None:
    first, later = make_questions(make_scene(3))[:2]
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": first.text}]},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": later.text},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    text = prompt.split(AFTER_VIDEO)[1]
    pack = pack_chats([(first, later), (later,)], 60, 2)
    count = int((pack.chat == 0).sum())
    assert pack.token_ids[: count - 1].tolist() == list(tokenize(text))
    assert pack.token_ids[pack.ask_at + 1].tolist() == pack.answers.tolist()
    assert [tokenizer().decode([token]) for token in pack.answers] == 2 * [later.answer]
    assert pack.offsets[:count].tolist() == list(range(count))
    assert pack.chat[count] == 1 and pack.offsets[count] == 0


def positions_of(question: Question, cells: Cells) -> torch.Tensor:
    """[3, 1, N] int64, by vLLM's rule, without the answer."""
    pack = pack_chats([(question,)], 40, 1)
    count = int((pack.chat != NO_QUESTION).sum())
    return pack_positions(
        make_prefix(STANDARD.num_steps, cells), torch.from_numpy(pack.offsets[None, : count - 1])
    )


def alone(batch: Batch, place: int) -> Batch:
    """`batch` with the question at `place` only."""
    chat = np.where(batch.packs.chat == place, place, NO_QUESTION)
    answers = np.full_like(batch.packs.answers, NO_QUESTION)
    answers[:, place] = batch.packs.answers[:, place]
    return replace(batch, packs=replace(batch.packs, chat=chat, answers=answers))


def test_packed_loss_is_the_mean_of_single_losses(model: Any) -> None:
    scene = make_scene(4)
    batch = make_batch([scene], [singly(draw_questions(scene, EQUAL, 6))], BatchSize(1, 120, 6))
    torch.manual_seed(0)
    heads = Heads(model.config.text_config.hidden_size)
    with torch.no_grad():
        packed = answer_step(model, heads, batch)
        single = [
            answer_step(model, heads, alone(batch, place)).parts["answer"]
            for place in np.nonzero(batch.packs.answers[0] != NO_QUESTION)[0]
        ]
    assert len(single) > 3
    torch.testing.assert_close(packed.parts["answer"], torch.stack(single).mean())
    assert torch.stack(single).std() > 0.01


def test_hiding_hides_the_video(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden in all layers, the answer depends on the video through the prefix's end alone."""
    monkeypatch.setattr(learner, "FIRST_LOOK_UP", len(model.model.language_model.layers))
    scenes = [make_scene(4), make_scene(5)]
    questions = [singly(draw_questions(scenes[0], EQUAL, 6))] * 2
    batch = make_batch(scenes, questions, BatchSize(2, 120, 6))
    packs = to_tensors(batch.packs, torch.device("cpu"))
    with torch.no_grad():
        video = network.encode_videos(model, network.patchify(torch.from_numpy(batch.frames)), 2)
        seen, hidden = (decode(model, video, packs, batch.prefix, hide) for hide in (False, True))
    own = packs["chat"][0] != NO_QUESTION
    differ_seen, differ_hidden = (
        (x.questions[0, own] - x.questions[1, own]).abs() for x in (seen, hidden)
    )
    assert differ_seen.max() > 0.01
    tokens = make_prefix(STANDARD.num_steps).token_ids
    assert tokens[-1] == tokenize("<|vision_end|>")[0]  # it sees the video
    assert differ_hidden.mean() < differ_seen.mean()
    assert hidden.glances is None
    assert seen.glances is not None and seen.glances > 0.1


def test_attention_to_is_that_of_transformers(model: Any) -> None:
    scene = make_scene(4)
    batch = make_batch([scene], [singly(make_questions(scene)[:1])], BatchSize(1, 20, 1))
    packs = to_tensors(batch.packs, torch.device("cpu"))
    columns = make_prefix(STANDARD.num_steps).video
    inner = model.model.language_model
    with torch.no_grad():
        video = network.encode_videos(model, network.patchify(torch.from_numpy(batch.frames)), 1)
        hidden, turns, mask = embed(model, video, packs, batch.prefix)
        ours = network.attention_to(inner.layers[0], hidden, turns, mask, columns)[0]
        own = packs["chat"][0] != NO_QUESTION
        length, asked = hidden.shape[1], mask.shape[2]
        causal = torch.full((length, length), -torch.inf).triu(1)[None, None]
        attention = inner.layers[0].self_attn
        attention.config._attn_implementation = "eager"
        _, weights = attention(
            hidden_states=inner.layers[0].input_layernorm(hidden),
            attention_mask=causal,
            position_embeddings=tuple(turn[:, 0] for turn in turns),
        )
    theirs = weights[0, :, length - asked :, columns].sum(-1)
    torch.testing.assert_close(ours[:, own], theirs[:, own])
    assert 0.1 < ours.min() and ours.max() < 1


def test_every_word_is_one_token() -> None:
    for answer in ANSWERS:
        assert len(tokenize(answer)) == 1
        assert tokenizer().decode(tokenize(answer)) == answer
    assert len({tokenize(answer) for answer in ANSWERS}) == len(ANSWERS)
    assert len(tokenize("what colour is the star?")) == 6
    assert len(tokenize("what colour is the STAR?")) == 10


def test_too_small_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="no chat fits"):
        pack_chats([tuple(make_questions(make_scene(0))[:1])], 5, 2)


def test_a_saved_model_comes_back(tmp_path: Path, model: Any) -> None:
    save_model(model, tokenizer(), tmp_path)
    loaded, own = load_model(tmp_path)
    assert own.get_vocab() == transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0.01, atol=0.01)
    assert (tmp_path / "model.safetensors").stat().st_size < 10e6


def test_the_last_word_of_a_question_is_found() -> None:
    for question in make_questions(make_scene(0)):
        pack = pack_chats([(question,)], 40, 1)
        word = int(pack.token_ids[pack.ask_at[0] - word_to_end()])
        assert question.text.endswith(tokenizer().decode([word]) + "?")
