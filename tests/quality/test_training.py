"""Training: repeatable, resumable, and it learns."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("cv2")
pytest.importorskip("matplotlib")

from vllm_dpp.quality import evaluate, network, schedule  # noqa: E402  (needs the modules above)
from vllm_dpp.quality.batches import BatchSize, Videos, training_batch  # noqa: E402
from vllm_dpp.quality.evaluate import (  # noqa: E402
    Score,
    held_out_batches,
    overall,
    score,
    table,
)
from vllm_dpp.quality.film import FILM_KINDS, SHOT  # noqa: E402
from vllm_dpp.quality.labels import NO_SHAPE  # noqa: E402
from vllm_dpp.quality.learner import Heads, embed, to_tensors, vision_step  # noqa: E402
from vllm_dpp.quality.model import save_model  # noqa: E402
from vllm_dpp.quality.packing import tokenizer  # noqa: E402
from vllm_dpp.quality.questions import KINDS  # noqa: E402
from vllm_dpp.quality.scene import SHORTER, STANDARD  # noqa: E402
from vllm_dpp.quality.train import Trainer, TrainOptions, main, train  # noqa: E402

SMALL = BatchSize(num_videos=2, num_tokens=60, num_places=6)
CPU = torch.device("cpu")


def test_resumed_training_goes_on_as_if_never_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "VISION_STEPS", 1)
    options = TrainOptions(seed=3, steps=8, size=SMALL)
    through = Trainer(options, CPU)
    with through.feed:
        losses = []
        for step in range(6):
            losses.append(through.train_step().loss.item())
            if step == 2:
                through.save_state(tmp_path / "state.pt")
    other = replace(options, seed=4)
    with pytest.raises(ValueError, match="'seed': 3.*'seed': 4.*resume with the same options"):
        Trainer(other, CPU).load_state(tmp_path / "state.pt")
    resumed = Trainer(options, CPU)
    resumed.load_state(tmp_path / "state.pt")
    with resumed.feed:
        again = [resumed.train_step().loss.item() for _ in range(3)]
    assert again == losses[3:]
    assert resumed.accuracies == through.accuracies
    for one, other in zip(through.parameters, resumed.parameters, strict=True):
        assert torch.equal(one, other)
    assert len(set(losses)) == 6


def test_a_batch_is_of_seed_and_step() -> None:
    weights = dict.fromkeys(KINDS, 1.0)
    videos = Videos(STANDARD)
    one, same = (training_batch(1, 7, videos, SMALL, weights) for _ in range(2))
    assert (one.frames == same.frames).all()
    assert (one.packs.token_ids == same.packs.token_ids).all()
    kind = int(one.packs.kinds.max())
    none = training_batch(1, 7, videos, SMALL, weights | {KINDS[kind]: 0.0})
    assert not (none.packs.kinds == kind).any()
    other = training_batch(1, 8, videos, SMALL, weights)
    assert (one.packs.token_ids != other.packs.token_ids).any()


def test_what_shows_a_thing_stays_first() -> None:
    """And nothing else that matters changes: with all of it kept the answers are the same."""
    model = Trainer(TrainOptions(seed=0, size=SMALL), CPU).model.eval()
    (batch,) = held_out_batches(STANDARD, 2, SMALL)
    shown = torch.from_numpy(batch.labels.shape != NO_SHAPE)
    count = int(shown.sum(1).max())
    kept = evaluate._things_first(batch, count)
    assert kept.shape == (2, count) and (kept.diff(dim=1) > 0).all()
    assert torch.zeros_like(shown).scatter(1, kept, True)[shown].all()
    packs = to_tensors(batch.packs, CPU)
    with torch.no_grad():
        frames = torch.from_numpy(batch.frames)
        video = network.encode_videos(model, network.patchify(frames), 2)
        whole = embed(model, video, packs, batch.prefix)
        everything = torch.arange(video.shape[1]).expand(2, -1)
        hidden, turns, mask = evaluate._enter(*whole, video.shape[1], everything)
        assert torch.equal(hidden, whole[0]) and torch.equal(mask, whole[2])
        assert all(map(torch.equal, turns, whole[1]))
        hidden, _, mask = evaluate._enter(*whole, video.shape[1], kept)
        start = batch.prefix.video.start
        rows = torch.arange(2)[:, None]
        assert torch.equal(hidden[:, start : start + count], video[rows, kept])
        assert mask.shape[3] == whole[2].shape[3] - video.shape[1] + count


def test_where_all_is_learned_each_length_is_seen_in_each_size() -> None:
    videos = [schedule.all_videos(step) for step in range(84)]
    assert Counter(one.num_shots for one in videos) == {1: 56, 2: 7, 3: 7, 4: 7, 11: 7}
    short = Counter((one.spec.num_steps, one.cells) for one in videos if one.num_shots == 1)
    assert len(short) == 3 * 4 and min(short.values()) == 2
    assert sum(number for (_, cells), number in short.items() if cells == (4, 4)) == 32


@pytest.mark.parametrize(("num_shots", "num_films"), [(2, 8), (4, 8), (11, 2)])
def test_a_batch_of_films_has_chats_about_each(num_shots: int, num_films: int) -> None:
    films = Videos(SHOT, num_shots=num_shots)
    batch = training_batch(1, 4, films, BatchSize(), {})
    assert batch.frames.shape == (num_films, 12 * num_shots, 112, 112, 3)
    assert batch.labels is None
    kinds = Counter(KINDS[kind] for kind in batch.packs.kinds.ravel() if kind >= 0)
    assert set(kinds) == set(FILM_KINDS) and kinds["pair"] > 10
    one, two = (batch.packs.ask_at[i] for i in range(2))
    assert (one != two).any()
    again = training_batch(1, 4, films, BatchSize(), {})
    assert (again.frames == batch.frames).all()
    assert (again.packs.token_ids == batch.packs.token_ids).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cells 0 4", "2 to 4 each"),
        ("--keep 0", "a share"),
        ("--keep 0.5 --cells 2 3", "leave out --cells"),
        ("--videos 0", "at least 1"),
        ("--split film --turn 1", "leave out --turn"),
    ],
)
def test_bad_arguments(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--model", "nowhere", *words.split()])
    assert message in capsys.readouterr().err


def test_all_videos_are_for_a_model_that_sees(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", "nowhere", "--all-videos"])
    assert "give --start" in capsys.readouterr().err


def test_vision_learns_in_a_few_steps() -> None:
    trainer = Trainer(TrainOptions(seed=0, size=SMALL), CPU)
    weights = dict.fromkeys(KINDS, 1.0)
    batch = training_batch(0, 0, Videos(SHORTER), SMALL, weights)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-3
    losses = []
    for _ in range(12):
        loss = vision_step(trainer.model, trainer.heads, batch).loss
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]


def test_command_leaves_a_checkpoint_and_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "VISION_STEPS", 1)
    options = TrainOptions(steps=3, size=SMALL, report_every=1, score_every=2, score_videos=4)
    train(tmp_path, options, CPU, resume=False)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert model.config.text_config.rms_norm_eps == 1e-6
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "losses" in r] == [1, 2, 3]
    assert [r["step"] for r in records if "held_out" in r] == [2, 3]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="give --resume"):
        train(tmp_path, options, CPU, resume=False)
    with pytest.raises(ValueError, match="is missing"):
        train(tmp_path / "elsewhere", options, CPU, resume=True)


def test_schedule() -> None:
    first = schedule.VISION_STEPS
    for begin, peak in ((0, schedule.VISION_RATE), (first, schedule.PEAK_RATE)):
        rates = [schedule.learning_rate(begin + step, 0.0) for step in (0, 50, 150)]
        assert rates[0] < rates[1] < rates[2] == peak
    assert schedule.learning_rate(1000, 0.2) == schedule.PEAK_RATE
    assert schedule.learning_rate(1000, 1.0) == pytest.approx(0.01 * schedule.PEAK_RATE)
    start = schedule.question_weights(schedule.first_accuracies())
    assert start["colour"] > 3 * start["twin"]
    late = schedule.question_weights(dict.fromkeys(KINDS, 0.9) | {"twin": 0.5})
    assert late["twin"] > 3 * late["colour"] > 0


def test_a_model_is_trained_further_and_its_read_outs_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "HEADS_STEPS", 2)
    start = Trainer(TrainOptions(seed=3, size=SMALL), CPU)
    save_model(start.model, tokenizer(), tmp_path / "start")
    trainer = Trainer(TrainOptions(seed=4, steps=4, size=SMALL, start=tmp_path / "start"), CPU)
    model, heads = ([x.clone() for x in m.parameters()] for m in (trainer.model, trainer.heads))

    def moved(module: torch.nn.Module, before: list[torch.Tensor]) -> bool:
        return any(not torch.equal(*pair) for pair in zip(module.parameters(), before, strict=True))

    with trainer.feed:
        for _ in range(2):
            trainer.train_step()
        assert moved(trainer.heads, heads) and not moved(trainer.model, model)
        trainer.train_step()
        assert moved(trainer.model, model)


def test_later_questions_are_scored_alone(model: object) -> None:
    alone, later = (
        next(held_out_batches(STANDARD, 2, BatchSize(2, 200, 8), turn=turn)) for turn in (0, 1)
    )
    assert (alone.packs.kinds[:, 1:] == later.packs.kinds[:, :-1]).all()
    assert (later.packs.chat == 0).sum() > (alone.packs.chat == 0).sum() + 10
    (scores,) = score(model, iter([later])).values()
    assert overall(scores).asked == 14


def test_scores_count_every_question(model: object) -> None:
    batches = list(held_out_batches(STANDARD, 5, SMALL))
    scores = score(model, iter(batches), floors=True)
    asked = sum(int((batch.packs.kinds >= 0).sum()) for batch in batches)
    assert set(scores) == {0, 1, 2, 3}
    assert all(overall(own).asked == asked for own in scores.values())
    assert f"{asked:6}" in table(scores, dict.fromkeys(KINDS, 0.1))


def test_interval_of_a_score() -> None:
    low, high = Score(95, 100).interval()
    assert low == pytest.approx(0.8882, abs=1e-4)  # published examples of Wilson's interval
    assert high == pytest.approx(0.9785, abs=1e-4)
    assert Score(0, 10).interval()[0] == pytest.approx(0)
    assert Score(1, 2) + Score(3, 4) == Score(4, 6)


def test_heads_read_words() -> None:
    heads, embedding = Heads(16), torch.randn(400, 16)
    assert heads.logits("shape", torch.randn(2, 5, 16), embedding).shape == (2, 5, 11)
    assert heads.logits("visit", torch.randn(2, 5, 16), embedding).shape == (2, 5, 5)
