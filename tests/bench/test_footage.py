"""The benchmark of real footage, on an mp4 that the test writes."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("transformers")

from vllm_dpp.bench import footage  # noqa: E402  (needs the modules above)
from vllm_dpp.toy.video import render_frames, write_mp4  # noqa: E402


def test_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footage, "NUM_RENDERED", 1)
    movie = write_mp4(tmp_path / "movie.mp4", render_frames(0, 40, 72, 180), 10.0)
    output = tmp_path / "result.json"
    assert footage.main([str(movie), "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["video"], row["features"]) for row in rows[-2:]] == [
        ("movie.mp4", "encoder"),
        ("movie.mp4", "pixels"),
    ]
    for row in rows:
        assert 0 <= row["change p10"] <= row["change p50"] <= row["change p90"] <= 2**0.5
        assert 1 <= row["directions 90 %"] <= row["directions 99 %"] <= row["tokens"]
        assert 0.2 <= row["quality"] <= 1
    assert rows[-1]["tokens"] == 4 * footage.NUM_CELLS, "four seconds"


def test_what_stands_still_does_not_change() -> None:
    frames = render_frames(0, 2, footage.SIDE, footage.SIDE)
    still = footage.measure(footage.features(None, np.concatenate([frames] * 3), "pixels"), 3)
    assert still["change p90"] < 0.05


def test_a_video_that_is_too_short_is_named(tmp_path: Path) -> None:
    movie = write_mp4(tmp_path / "short.mp4", render_frames(0, 2, 56, 56), 2.0)
    with pytest.raises(ValueError, match=r"short\.mp4: expected a video of two seconds or more"):
        footage.main([str(movie)])
