"""The committed models, in plain PyTorch. `tests/e2e/test_quality_server.py` asks it over HTTP."""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("cv2")

from safetensors import safe_open  # noqa: E402

from vllm_dpp.quality.evaluate import Score, held_out_batches, overall, score  # noqa: E402
from vllm_dpp.quality.model import CHECKPOINTS, FIRST_LOOK_UP, LEARNED, load_model  # noqa: E402
from vllm_dpp.quality.questions import chance_levels  # noqa: E402
from vllm_dpp.quality.scene import STANDARD  # noqa: E402

VIDEOS = 32


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=lambda folder: folder.name)
def checkpoint(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.param
    return folder


@pytest.fixture(scope="module")
def scores(checkpoint: Path) -> dict[int, dict[str, Score]]:
    model, _ = load_model(checkpoint)
    return score(model, held_out_batches(STANDARD, VIDEOS), floors=True)


def learned(scores: dict[str, Score]) -> dict[str, Score]:
    return {kind: own for kind, own in scores.items() if kind in LEARNED}


def test_it_answers_every_kind_that_the_tables_use(scores: dict[int, dict[str, Score]]) -> None:
    full = learned(scores[max(scores)])
    assert set(full) == set(LEARNED)
    assert overall(full).accuracy > 0.95
    for kind, own in full.items():  # few are asked here; the record of the training asks more
        assert own.interval()[1] > 0.95 and own.accuracy > 0.85, kind


def test_it_must_see_the_video_from_the_first_look_up_on(
    scores: dict[int, dict[str, Score]],
) -> None:
    chance = chance_levels(STANDARD, range(900_000, 904_000))
    for kind, own in learned(scores[FIRST_LOOK_UP]).items():
        low, _ = own.interval()
        assert low < chance[kind] + 0.05, kind
    assert overall(learned(scores[FIRST_LOOK_UP + 1])).accuracy < 0.7


def test_it_is_small_and_bfloat16(checkpoint: Path) -> None:
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 5e6
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}


def test_the_record_tells_of_the_same_model(checkpoint: Path) -> None:
    records = checkpoint.parent.parent / "training" / checkpoint.name
    record: dict[str, Any] = json.loads((records / "standard.json").read_text())
    full = {kind: Score(**own) for kind, own in record["scores"][max(record["scores"])].items()}
    assert overall(learned(full)).accuracy > 0.95
    assert min(full[kind].accuracy for kind in LEARNED) > 0.9
