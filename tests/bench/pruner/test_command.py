"""`vllm-dpp bench pruner`: its arguments, its refusal, and small runs of all of it."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from vllm_dpp.bench.pruner import command as pruner
from vllm_dpp.bench.pruner.arms import ARMS, NAMES
from vllm_dpp.bench.pruner.options import GROWTH, PUBLISHED, parse

SMALL = "--sizes 96 192 384 --dim 64 --tokens-per-segment 48 --repeats 2".split()


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_default_cases():
    cases = parse([]).cases
    assert cases == [*PUBLISHED, *GROWTH]
    assert [(case.num_tokens, case.num_kept) for case in PUBLISHED] == [(1024, 512), (8192, 2048)]
    assert [case.num_tokens for case in GROWTH] == [1024 << i for i in range(7)]
    assert len({(case.dim, case.tokens_per_segment, case.series) for case in GROWTH}) == 1


def test_cases_of_sizes():
    options = parse("--sizes 512 256 --dim 64 128 --segments 4 --retention-ratio 0.5".split())
    assert [(case.dim, case.num_tokens) for case in options.cases] == [
        *((64, 256), (64, 512), (128, 256), (128, 512)),
    ]
    assert {case.num_segments for case in options.cases} == {4}
    assert [case.kept_per_segment for case in options.cases[:2]] == [32, 64]
    assert len({case.series for case in options.cases}) == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--dim 64", "--dim needs --sizes"),
        ("--sizes 100", "100 tokens do not divide into equal segments by 256"),
        ("--sizes 0", "0 tokens do not divide"),
        ("--sizes 512 --segments 0", "do not divide into equal segments by 0"),
        ("--sizes 512 --segments 2 --tokens-per-segment 256", "exclude each other"),
        ("--sizes 512 --retention-ratio 0", "--retention-ratio must be in (0, 1]"),
        ("--sizes 512 --dim 32", "64 tokens of 32 features each have no volume"),
        ("--sizes 65536 --segments 1 --dim 20000", "the reference is too slow"),
        ("--repeats 0", "--repeats must be at least 1"),
        ("--threads 0", "--threads must be at least 1"),
        ("--max-kernel-mib 0", "max_kernel_bytes must be an integer >= 1"),
        ("--dtype int8", "invalid choice"),
    ],
)
def test_bad_arguments(capsys, arguments, expected):
    assert expected in refusal(capsys, *arguments.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert "finds no CUDA device" in refusal(capsys, "--device", "cuda")


def one_other(run):
    """Exchange the last token of an answer for one that is not kept."""

    def spoiled():
        kept = run()
        free = min(set(range(int(kept[0]) // 48 * 48, int(kept[-1]) + 1)) - set(kept.tolist()))
        same_segment = [place for place, token in enumerate(kept) if token // 48 == free // 48]
        wrong = kept.clone()
        wrong[same_segment[-1]] = free
        return wrong.sort().values

    return spoiled


def test_a_wrong_arm_forbids_the_report(capsys, monkeypatch, tmp_path):
    right = ARMS["cdpruner"]
    wrong = replace(right, prepare=lambda problem: one_other(right.prepare(problem)))
    monkeypatch.setitem(ARMS, "wrong", wrong)
    output = tmp_path / "x.json"
    arguments = [*SMALL, "--arms", "cdpruner", "wrong", "gram", "--json", str(output)]
    assert pruner.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "arm wrong is wrong at N 96" in captured.err
    assert "a token taken has a gain" in captured.err
    assert "arm cdpruner" not in captured.err
    assert not output.exists()


def test_a_small_run(capsys, tmp_path):
    output = tmp_path / "folder" / "x.json"
    arguments = [*SMALL, "--dtype", "bfloat16", "--json", str(output)]
    assert pruner.main(arguments) == 0
    printed = capsys.readouterr().out
    document = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text()
    assert "--json x.json" in document["provenance"]["command"]
    assert document["threads"] == torch.get_num_threads()
    assert [case["num_tokens"] for case in document["cases"]] == [96, 192, 384]
    for case in document["cases"]:
        assert {"original", "cdpruner", "torch", NAMES, "gram"} <= set(case["arms"])
        assert case["judged_segments"] == case["num_segments"]
        for arm in case["arms"].values():
            assert len(arm["seconds"]) == 2 and min(arm["seconds"]) > 0
            assert arm["peak_bytes"] > 0
    (growth,) = document["growth"].values()
    assert growth["torch"]["sizes"] == [96, 192, 384]
    assert f"{case['arms']['torch']['median_seconds'] * 1000:.2f}" in printed
    assert "fused: not run, needs an NVIDIA GPU" in printed


def test_slow_arms_are_left_out_with_a_word(capsys):
    sizes = ["--sizes", "3072", "--dim", "64", "--tokens-per-segment", "48", "--repeats", "1"]
    arguments = [*sizes, "--arms", "original", "gram", "--max-seconds", "0.001"]
    assert pruner.main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"original: not run, \S+ s at N = 48, so up to .*--max-seconds 0.001", printed)


def test_needs_torch_alone():
    """Neither vLLM nor anything that comes with it, and not one of our own engine files."""
    program = (
        "import sys\n"
        "for name in ('vllm', 'transformers', 'tqdm', 'matplotlib', 'numba', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "from vllm_dpp.cli import main\n"
        f"status = main(['bench', 'pruner', *{SMALL!r}])\n"
        "loaded = [n for n in sys.modules if n.startswith('vllm_dpp.serving')]\n"
        "sys.exit(status or bool(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "per-segment" in done.stdout
    assert "compiled: not run, needs a CPU and numba" in done.stdout
    assert done.stderr.count("\n") == 1 and "loop of the pruner is switched off" in done.stderr
