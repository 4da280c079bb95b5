"""The tests marked `gpu`, which a checkout has and an installed package has not."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vllm_dpp.bench.provenance import provenance

MODULE = "vllm_dpp.bench.gpu.marked_tests"
ROOT = Path(__file__).parents[3]
SMALL = ("--select", "not gpu", "--paths", "tests/pruning/test_fused.py", "--", "-k", "reference")


def main(argv: list[str] | None = None) -> int:
    """Run them; the exit status is pytest's."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    add = parser.add_argument
    add("--select", default="gpu", metavar="MARKERS", help="(%(default)s)")
    add("--paths", nargs="+", default=["tests"], metavar="PATH", help="in the checkout")
    add("--output", type=Path, required=True, metavar="FILE.json", help="what passed")
    add("pytest", nargs="*", help="after --: further arguments of pytest")
    options = parser.parse_args(arguments)
    if not (ROOT / "tests").is_dir():
        print("the tests are in a checkout of the repository, not in the package", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-m", options.select, "-q", f"--junitxml={xml}"]
        done = subprocess.run([*command, *options.paths, *options.pytest], cwd=ROOT, check=False)
        results = outcomes(xml) if xml.exists() else {}
    document = {
        "provenance": provenance(MODULE, arguments, ("triton",)),
        "outcomes": results,
        "is_complete": done.returncode == 0,
    }
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(render(document))
    return done.returncode


def outcomes(xml: Path) -> dict[str, str]:
    """Of each test of a JUnit file: ``passed``, ``skipped``, ``failure`` or ``error``."""
    found = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        verdicts = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = verdicts[0] if verdicts else "passed"
    return found


def render(document: dict[str, Any]) -> str:
    """How many there were of each kind, and the names of those that failed."""
    results = document["outcomes"]
    kinds = sorted(set(results.values()))
    counts = [f"{list(results.values()).count(kind)} {kind}" for kind in kinds]
    bad = [name for name, kind in results.items() if kind in ("failure", "error")]
    return "\n".join([", ".join(counts) or "none ran", *bad])


if __name__ == "__main__":
    raise SystemExit(main())
