"""Which versions of vLLM are served, and what the others get: one clear line."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vllm_dpp import cli, serving
from vllm_dpp.serving import vllm_versions
from vllm_dpp.serving.vllm_versions import SUPPORTED, UnsupportedVersionError

ROOT = Path(__file__).parents[2]
OTHER = "0.35.1+cpu"
PROGRAM = f"""
import importlib.metadata, sys
inner = importlib.metadata.version
importlib.metadata.version = lambda name: {OTHER!r} if name == "vllm" else inner(name)

from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm import ModelRegistry

load_general_plugins()
assert not [name for name in ModelRegistry.get_supported_archs() if name.startswith("DPP")]
stock = EngineArgs(sys.argv[1], max_model_len=512).create_engine_config()
assert stock.model_config.architecture == "Qwen2_5_VLForConditionalGeneration"
pruned = {{"architectures": ["DPPQwen2_5_VLForConditionalGeneration"]}}
EngineArgs(sys.argv[1], max_model_len=512, hf_overrides=pruned).create_engine_config()
"""


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.0", "0.33.1rc1.dev3+g12"])
def test_served(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_versions, "version", lambda name: version)
    vllm_versions.check()


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.34.0rc1", "dev"])
def test_not_served(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_versions, "version", lambda name: version)
    remedy = f"serves vLLM {SUPPORTED}, and this is vLLM {version}: pip install"
    with pytest.raises(UnsupportedVersionError, match=remedy):
        vllm_versions.check()


@pytest.mark.parametrize(
    "command",
    [
        ["serve", "somewhere", "--dry-run"],
        ["batch", "model", "--input", ".", "--output", "answers"],
    ],
)
def test_our_commands_stop_at_once(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_versions, "version", lambda name: OTHER)
    assert cli.main(command) == 2
    assert f"this is vLLM {OTHER}: pip install" in capsys.readouterr().err


def test_elsewhere_stock_models_start_and_ours_are_unknown(tiny_checkpoint: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_checkpoint)], capture_output=True, text=True
    )
    assert run.returncode == 1
    said = run.stdout + run.stderr
    assert f"no model is pruned: vllm-dpp 0.1.0 serves vLLM {SUPPORTED}" in said
    assert "DPPQwen2_5_VLForConditionalGeneration'] are not supported" in said, said[-2000:]


def test_the_package_and_the_page_name_the_same_versions() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert f"vllm{SUPPORTED}" in extras["cuda"]
    page = (Path(serving.__file__).parent / "README.md").read_text()
    assert f"vLLM `{SUPPORTED}`" in page
