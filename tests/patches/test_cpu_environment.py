"""The hook of patches/cpu-environment mends the broken builds and leaves healthy ones alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PATCH = Path(__file__).parents[2] / "patches" / "cpu-environment"

# What a torchvision without its compiled library does while it is imported.
BROKEN_TORCHVISION = """
import torch
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
torch.library.register_fake("torchvision::qnms")(lambda dets, scores, iou_threshold: dets)
"""
TORCHAUDIO_LOADER = """
def _load_lib(lib):
    if lib == "broken":
        raise OSError("Could not load this library")
    return lib == "present"
"""


def run(code: str, *stubs: Path) -> str:
    """Runs `code` in a fresh process with the hook and, first on the path, the stub packages."""
    path = os.pathsep.join(map(str, [*stubs, PATCH]))
    result = subprocess.run(
        [sys.executable, "-c", "import vllm_cpu_environment\n" + code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def stub(folder: Path, name: str, code: str) -> Path:
    """Writes the module `name` (dotted) below `folder`, each of its parents an empty package."""
    *parents, last = name.split(".")
    for i in range(len(parents)):
        package = folder.joinpath(*parents[: i + 1])
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
    folder.joinpath(*parents, f"{last}.py").write_text(code)
    return folder


@pytest.mark.slow
def test_the_environment_works() -> None:
    pytest.importorskip("vllm")
    code = "import torchvision, torchaudio, vllm, importlib.metadata as m; print(m.version('vllm'))"
    assert run(code).splitlines()[-1].startswith("0.32.0")


@pytest.mark.slow
def test_vllm_command_starts() -> None:
    pytest.importorskip("vllm")
    command = Path(sys.executable).with_name("vllm")
    result = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "0.32.0" in result.stdout


def test_start_imports_nothing() -> None:
    assert run("import sys; print([m for m in sys.modules if m.startswith('torch')])") == "[]"


def test_finding_torchvision_imports_nothing(tmp_path: Path) -> None:
    code = "import sys, importlib.util as u; print(bool(u.find_spec('torchvision')), {})"
    stub(tmp_path, "torchvision", "raise RuntimeError")
    assert run(code.format("'torch' in sys.modules"), tmp_path) == "True False"


def test_broken_torchvision_is_mended(tmp_path: Path) -> None:
    stub(tmp_path, "torchvision", BROKEN_TORCHVISION)
    code = "import torchvision, torch; print(torch.ops.torchvision.nms, torch.ops.torchvision.qnms)"
    assert run(code, tmp_path) == "torchvision.nms torchvision.qnms"


def test_healthy_torchvision_is_left_alone(tmp_path: Path) -> None:
    stub(tmp_path, "torchvision", "runs = [*globals().get('runs', ()), 1]")
    code = (
        "import torchvision, torch\n"
        "print(torchvision.runs, hasattr(torch.ops.torchvision, 'nms'), "
        "vllm_cpu_environment._libraries)"
    )
    assert run(code, tmp_path) == "[1] False []"


def test_other_errors_of_torchvision_pass(tmp_path: Path) -> None:
    stub(tmp_path, "torchvision", "raise RuntimeError('something else')")
    code = "try:\n    import torchvision\nexcept RuntimeError as error:\n    print(error)"
    assert run(code, tmp_path) == "something else"


def test_torchaudio_library_that_does_not_load_counts_as_missing(tmp_path: Path) -> None:
    stub(tmp_path, "torchaudio._extension.utils", TORCHAUDIO_LOADER)
    code = (
        "from torchaudio._extension.utils import _load_lib\n"
        "print(*map(_load_lib, ['broken', 'missing', 'present']))"
    )
    assert run(code, tmp_path) == "False False True"


def test_torchcodec_that_does_not_load_is_an_import_error(tmp_path: Path) -> None:
    stub(tmp_path, "torchcodec", "raise OSError('Could not load this library')")
    code = "try:\n    import torchcodec\nexcept ImportError as error:\n    print(error)"
    assert run(code, tmp_path) == "Could not load this library"
