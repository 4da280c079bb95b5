"""What `pip install .` brings: the product, without its laboratory."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split("\n")[:-1]
    for name in tracked:
        if name.split("/")[0] in ("vllm_dpp", "pyproject.toml", "README.md"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = f"{sys.executable} -m pip wheel --no-deps --no-build-isolation --no-index -w".split()
    subprocess.run([*build, folder, source], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_product_is_in_it_and_the_laboratory_is_not(installed: Path) -> None:
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert "vllm_dpp/pruning/rules/dpp.py" in names
    assert "vllm_dpp/serving/front/plugin.py" in names
    assert "vllm_dpp/bench/throughput/command.py" in names
    assert "vllm_dpp/py.typed" in names
    assert not [name for name in names if "quality" in name or name.endswith(".safetensors")]
    assert sum(path.stat().st_size for path in installed.rglob("*.*") if path.is_file()) < 2e6


@pytest.mark.parametrize(
    "arguments", [["quality"], ["share-out"], ["large-frames"], ["footage"], ["soak"]]
)
def test_what_needs_the_laboratory_says_so(installed: Path, arguments: list[str]) -> None:
    # Without `site`, which would let an editable installation fill in what the wheel lacks.
    command = [sys.executable, "-S", "-m", "vllm_dpp", "bench", *arguments]
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        command, cwd=installed, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "in a checkout of its repository" in done.stderr


DISTRIBUTIONS = {"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml"}
"""Where a module's name is not that of what it is installed with."""
BROUGHT_ALONG = {"triton": "torch", "llvmlite": "numba"}


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = {
        re.split(r"[\[<>=]", requirement)[0]
        for requirement in (*project["dependencies"], *(r for extra in extras for r in extra))
    }
    for path in (ROOT / "vllm_dpp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in (name.partition(".")[0] for name in names):
                if name not in sys.stdlib_module_names and name != "vllm_dpp":
                    name = BROUGHT_ALONG.get(name, name)
                    assert DISTRIBUTIONS.get(name, name) in declared, f"{path}: {name}"
