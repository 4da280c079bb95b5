"""`vllm-dpp`: from arguments to the plain command."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from vllm_dpp import cli, serve_command
from vllm_dpp.serve_command import DEFAULT_SHARE
from vllm_dpp.serving.front.families import FAMILIES, Family
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.setting_flags import described_fields

VARIANT = {"architectures": ["DPPQwen2_5_VLForConditionalGeneration"]}
NUM_LAYERS = 36


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path / "model", "Qwen2_5_VLForConditionalGeneration")


def write_model(folder: Path, *architectures: str) -> str:
    folder.mkdir()
    config = {
        "architectures": list(architectures),
        "text_config": {"num_hidden_layers": NUM_LAYERS},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def plain(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The words of the printed command."""
    assert cli.main(["serve", *arguments, "--dry-run"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("+ ")
    words = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {line[2:]}"], text=True)
    return words.split("\0")[:-1]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of arguments that cannot be served."""
    try:
        status = cli.main(["serve", *arguments, "--dry-run"])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2 and not captured.out
    return captured.err


def value(command: list[str], flag: str) -> Any:
    assert command.count(flag) == 1
    return json.loads(command[command.index(flag) + 1])


def test_the_plain_command(capsys: pytest.CaptureFixture[str], model: str) -> None:
    arguments = ["--retention-ratio", "0.5", "--prune_layer=9", "-tp", "2", "--port", "8001"]
    assert plain(capsys, model, *arguments) == [
        *("vllm", "serve", model, "-tp", "2", "--port", "8001"),
        *("--hf-overrides", json.dumps(VARIANT)),
        *("--additional-config", '{"dpp": {"retention_ratio": 0.5, "prune_layer": 9}}'),
    ]


@pytest.mark.parametrize(
    ("arguments", "dpp"),
    [
        ([], {"video_share": DEFAULT_SHARE}),
        (["--prune-layer", "9"], {"prune_layer": 9, "video_share": DEFAULT_SHARE}),
        (["--video-share", "0.7"], {"video_share": 0.7}),
        (["--entry-ratio", "0.7"], {"entry_ratio": 0.7}),
        (["--retention-ratio", "1"], {"retention_ratio": 1.0}),
        (["--rule", "change"], {"rule": "change"}),
        (["--additional-config", '{"dpp": {"retention_ratio": 1}}'], {"retention_ratio": 1}),
    ],
)
def test_a_default_share_where_nothing_says_how_much_is_left(
    capsys: pytest.CaptureFixture[str], model: str, arguments: list[str], dpp: dict[str, Any]
) -> None:
    command = plain(capsys, model, *arguments)
    assert value(command, "--hf-overrides") == VARIANT
    assert value(command, "--additional-config") == {"dpp": dpp}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.base)
def test_every_family_has_the_default_share(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, family: Family
) -> None:
    command = plain(capsys, write_model(tmp_path / "model", family.base))
    assert value(command, "--hf-overrides") == {"architectures": [family.variant]}
    assert value(command, "--additional-config") == {"dpp": {"video_share": DEFAULT_SHARE}}


def test_every_setting_has_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    described = described_fields(ServingSettings)
    for field in fields(ServingSettings):
        assert serve_command.flag_of(field.name) in text
        assert len(described[field.name]) > 20
        first, second = described[field.name][:2]
        assert not (first.isupper() and second.islower()), "help texts begin with a small letter"
        assert not described[field.name].endswith(".")


@pytest.mark.parametrize("command", ["chat", "quality", "serve", "soak", "throughput"])
def test_what_is_left_out_has_no_default(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: " in text
    assert not any(f"(default: {nothing})" in text for nothing in ("None", "[]", "False"))


def test_own_json_is_merged(capsys: pytest.CaptureFixture[str], model: str) -> None:
    command = plain(
        capsys,
        *(model, "--hf_overrides", '{"text_config": {"use_sliding_window": false}}'),
        *('--additional-config={"other": 1, "dpp": {"budget": "relevance"}}',),
        *("--retention-ratio", "0.5"),
    )
    assert value(command, "--hf-overrides") == VARIANT | {
        "text_config": {"use_sliding_window": False}
    }
    dpp = {"budget": "relevance", "retention_ratio": 0.5}
    assert value(command, "--additional-config") == {"other": 1, "dpp": dpp}


def test_dotted_forms_are_merged(capsys: pytest.CaptureFixture[str], model: str) -> None:
    command = plain(
        capsys,
        *(model, "--additional-config.dpp.prune_layer", "9", "--retention-ratio", "0.5"),
        *("--additional-config.dpp.segment_by=scene", "--hf-overrides.text_config.x+", "a,b"),
        *("--additional-config", '{"dpp": {"budget": "relevance"}}', "--port", "1"),
    )
    assert command[3:5] == ["--port", "1"]
    assert value(command, "--hf-overrides") == VARIANT | {"text_config": {"x": ["a", "b"]}}
    dpp = {"prune_layer": 9, "retention_ratio": 0.5, "segment_by": "scene", "budget": "relevance"}
    assert value(command, "--additional-config")["dpp"] == dpp


def test_flags_win_over_a_config_file(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {model}\n"
        "hf-overrides: {a: 1}\nadditional_config: {dpp: {prune_layer: 9, retention_ratio: 0.25}}\n"
    )
    command = plain(capsys, "--config", str(path), "--retention-ratio", "0.5")
    assert command[:4] == ["vllm", "serve", "--config", str(path)]
    assert value(command, "--hf-overrides") == VARIANT | {"a": 1}
    dpp = {"prune_layer": 9, "retention_ratio": 0.5}
    assert value(command, "--additional-config") == {"dpp": dpp}
    path.write_text(f"model: {model}\nadditional-config.dpp.prune_layer: 9\n")
    assert "as nested YAML" in refusal(capsys, "--config", str(path))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--retention-ratio", "1.5"], "--retention-ratio must be a number in (0, 1], got 1.5"),
        (["--retention-ratio", "half"], "argument --retention-ratio: invalid float value: 'half'"),
        (["--segment-by", "shot"], "argument --segment-by: invalid choice: 'shot'"),
        (["--min-retention-ratio", "0.5"], "0.25 is below --min-retention-ratio 0.5"),
        (["--prune-layer", "-1"], "--prune-layer must be an integer >= 0"),
        (["--prune-layer", "36"], "--prune-layer must be below the model's 36 layers, got 36"),
        (["--additional-config", '{"dpp": {"prune_layr": 9}}'], "did you mean 'prune_layer'?"),
        (["--additional-config", '{"dpp": 9}'], "'dpp' must be an object, got 9"),
        (["--additional-config", "{dpp}"], "argument --additional-config: not JSON: '{dpp}'"),
        (["--hf-overrides", "[]"], "argument --hf-overrides: not a JSON object"),
        (
            ["--prune-layer", "9", "--additional-config", '{"dpp": {"prune_layer": 7}}'],
            """--prune-layer 9 contradicts --additional-config '{"dpp": {"prune_layer": 7}}'""",
        ),
    ],
)
def test_bad_settings_are_refused_at_once(
    capsys: pytest.CaptureFixture[str], model: str, arguments: list[str], expected: str
) -> None:
    assert expected in refusal(capsys, model, *arguments)


def test_models_that_cannot_be_pruned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    llama = write_model(tmp_path / "llama", "LlamaForCausalLM")
    assert "LlamaForCausalLM cannot be pruned; supported" in refusal(capsys, llama)
    assert "the model comes first" in refusal(capsys, "--port", "8000")
    (tmp_path / "empty").mkdir()
    message = refusal(capsys, str(tmp_path / "empty"))
    assert "cannot read config.json of" in message and "--hf-overrides" in message


def test_a_named_architecture_spares_the_config(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    named = '{"architectures": ["Qwen2_5_VLForConditionalGeneration"]}'
    command = plain(capsys, "s3://bucket/model", "--hf-overrides", named)
    assert value(command, "--hf-overrides") == VARIANT


def test_serving_becomes_the_printed_command(
    capsys: pytest.CaptureFixture[str], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = plain(capsys, model, "--prune-layer", "9")
    executed: list[str] = []
    monkeypatch.setattr(os, "execv", lambda path, words: executed.extend([path, *words]))
    assert cli.main(["serve", model, "--prune-layer", "9"]) == 0
    module = ["-m", "vllm.entrypoints.cli.main"]
    assert executed == [sys.executable, sys.executable, *module, *printed[1:]]


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--help"], 0, "commands:"),
        (["serve", "--help"], 0, "--retention-ratio"),
        (["serve", "model"], 2, "pip install 'vllm-dpp[cuda]'"),
        (["bench", "pruner", "--help"], 0, "--max-seconds"),
        (["bench", "pruner", "--arms", "fast"], 2, "error: unknown arm 'fast'"),
        (["bench", "other"], 2, "choose from"),
    ],
)
def test_without_vllm(arguments: list[str], status: int, expected: str) -> None:
    program = (
        "import sys; sys.modules['vllm'] = None\n"
        "from vllm_dpp.cli import main\n"
        f"code = main({arguments!r})\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == status
    assert expected in done.stdout + done.stderr


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from vllm_dpp.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
