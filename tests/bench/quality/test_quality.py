"""The benchmark itself, small: the trained model answers through vLLM, pruned and not."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm_dpp.bench.quality.arms import TWO_STAGES  # noqa: E402
from vllm_dpp.bench.quality.command import main  # noqa: E402
from vllm_dpp.bench.quality.test_set import SCENE_KINDS  # noqa: E402
from vllm_dpp.quality.model import LEARNED, MODEL, TRAINED  # noqa: E402
from vllm_dpp.serving.cost_model import kv_share  # noqa: E402
from vllm_dpp.serving.layer_groups import default_prune_layer  # noqa: E402
from vllm_dpp.serving.settings import ServingSettings  # noqa: E402
from vllm_dpp.toy.checkpoint import make_checkpoint  # noqa: E402

PER_KIND = 40
SHARE = 0.3  # that one stage in the middle cannot reach


def test_answers_survive_pruning_by_default_and_not_at_random(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = default_prune_layer(MODEL.num_layers)
    budget = kv_share(layer, MODEL.num_layers, ServingSettings().retention_ratio)
    ours, peer = f"dpp@{layer}", f"random@{layer}"
    arguments = ["--splits", "standard", "--per-kind", f"{PER_KIND}", "--budgets", f"{budget}"]
    arguments += [f"{SHARE}", "--methods", "full", ours, peer, TWO_STAGES]
    arguments += ["--against", ours, "--output", f"{tmp_path}"]
    assert main([*arguments, "--models", str(TRAINED), "--pictures", "1", "--plot"]) == 0
    document = json.loads((tmp_path / "quality.json").read_text())
    (split,) = document["splits"]
    assert split["num_questions"] == PER_KIND * len({*LEARNED} & {*SCENE_KINDS})
    arms = {arm["method"]: arm for arm in split["arms"]}  # of two stages the smaller share
    assert arms[TWO_STAGES]["share"] == pytest.approx(SHARE, abs=0.005)
    assert arms[TWO_STAGES]["accuracy"] >= 0.9 * arms["full"]["accuracy"]
    assert arms[ours]["share"] == pytest.approx(budget, abs=0.005)
    assert arms["full"]["accuracy"] >= 0.94  # 95 % or more on many questions; 2 sigma of these
    assert arms[ours]["accuracy"] >= 0.97 * arms["full"]["accuracy"]
    assert arms[peer]["points_to"][ours]["high"] < -4
    floor = split["floors"][0][str(layer)]
    assert sum(floor.values()) / len(floor) < 0.9  # what was dropped there did matter
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert (tmp_path / "kept-standard.png").stat().st_size > 10_000
    assert ours in (tmp_path / "quality.md").read_text()
    # Nothing is answered twice.
    capsys.readouterr()
    assert main([*arguments, "--models", str(TRAINED)]) == 0
    assert "tokens, share" not in capsys.readouterr().out
    again = json.loads((tmp_path / "quality.json").read_text())
    assert again["splits"] == document["splits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "best@3"], "unknown method 'best@3'"),
        (["--methods", "dpp@9"], "the model has 8 layers"),
        (["--against", "dpp-soft@4"], "unknown method 'dpp-soft@4'"),
        (["--draw", "fulll"], "unknown method 'fulll'"),
        (["--methods", "full", "evs", "--pictures", "1"], "--pictures are of a SELECTOR@K"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([*arguments, "--splits", "standard", "--output", str(tmp_path)])


def test_models_whose_answers_cannot_be_pooled(tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(TRAINED, other)
    arguments = ["--output", str(tmp_path), "--models", str(TRAINED), str(other)]
    with pytest.raises(ValueError, match="two have the same weights"):
        main(arguments)
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 6
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must have equally many layers"):
        main(arguments)
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match="is a .'LlamaForCausalLM'., no Qwen2_5_VL"):
        main(arguments)
    (other / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        main(arguments)
    (other / "model.safetensors").rename(other / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="has no model.safetensors; give a folder 'model'"):
        main(arguments)


def test_a_model_without_the_words_of_the_task(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="has no token for 'circle'"):
        main(["--output", str(tmp_path), "--models", str(tmp_path)])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--budgets", "1.5"],
        ["--per-kind", "0"],
        ["--kinds", "colours"],
        ["--splits", "ordinary", "--kinds", "colour"],
    ],
)
def test_bad_options(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
