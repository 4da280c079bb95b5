"""The picture of the pruner benchmark."""

import importlib.util

import pytest

from vllm_dpp.bench.provenance import provenance
from vllm_dpp.bench.pruner import plot as pruner_plot
from vllm_dpp.bench.pruner.arms import ARMS

from .test_report import cases

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)


def test_every_arm_has_a_colour_of_its_own():
    assert set(pruner_plot.COLOURS) == set(ARMS)
    assert len(set(pruner_plot.COLOURS.values())) == len(ARMS)


@needs_matplotlib
def test_a_series_needs_two_sizes():
    assert pruner_plot.drawable(["a", None, "a", "b"]) == ["a"]
    with pytest.raises(ValueError, match="two --sizes or more"):
        pruner_plot.drawable(["a", None, None])


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="it is there")
def test_without_matplotlib():
    with pytest.raises(ValueError, match="needs matplotlib: pip install"):
        pruner_plot.drawable(["a", "a"])


@needs_matplotlib
def test_a_picture(tmp_path):
    document = {
        "provenance": provenance("m", []),
        "device": "cpu",
        "dtype": "float32",
        "threads": 2,
        "repeats": 1,
        "cases": cases({"original": 2, "torch": 1, "gram": 1}),
    }
    pruner_plot.draw(document, tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
