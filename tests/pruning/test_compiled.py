"""What machine code adds to the loop: threads, forks, and neighbours that walk over modules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_dpp.pruning.dpp import compiled
from vllm_dpp.pruning.dpp.greedy_map import greedy_map
from vllm_dpp.pruning.dpp.kernel import conditioned_kernel

ROOT = Path(__file__).parents[2]


@pytest.fixture
def problem():
    """Eight segments, enough work for threads."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 256, 64, generator=generator)
    relevance = 0.1 + torch.rand(8, 256, generator=generator)
    budgets = torch.tensor([128, 0, 1, 256, 100, 128, 17, 90])
    return conditioned_kernel(features, relevance), relevance, budgets


def test_threads_change_nothing(problem):
    kernel, relevance, budgets = problem
    assert kernel.shape[0] * kernel.shape[1] * int(budgets.max()) ** 2 > 2 * compiled._PER_THREAD
    alone = compiled.greedy_map_compiled(*problem)  # one thread: see conftest.py
    torch.set_num_threads(3)
    for one, many in zip(alone, compiled.greedy_map_compiled(*problem), strict=True):
        assert torch.equal(one, many)
    everything = torch.ones_like(relevance, dtype=torch.bool)
    plain = greedy_map(kernel, relevance, everything, budgets, 256)
    assert torch.equal(plain.keep, alone.keep)


def test_a_batch_changes_nothing(problem):
    together = compiled.greedy_map_compiled(*problem).keep
    for s in range(8):
        alone = compiled.greedy_map_compiled(*(part[s : s + 1] for part in problem)).keep
        assert torch.equal(together[s : s + 1], alone)


def test_a_child_has_threads_of_its_own(problem):
    torch.set_num_threads(2)
    expected = compiled.greedy_map_compiled(*problem).keep
    child = os.fork()
    if child == 0:
        same = torch.equal(expected, compiled.greedy_map_compiled(*problem).keep)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_may_use_every_cpu_though_their_creator_may_not(problem):
    """OpenMP binds each of its threads, the main one too, to a single CPU."""
    script = (
        "import os, torch\n"
        "from vllm_dpp.pruning.dpp import compiled\n"
        "torch.set_num_threads(2); torch.rand(400, 400) @ torch.rand(400, 400)\n"
        "everywhere = os.sched_getaffinity(0)\n"
        "os.sched_setaffinity(0, {min(everywhere)})\n"
        "threads = compiled._threads(2)\n"
        "print(threads.submit(os.sched_getaffinity, 0).result() == everywhere)\n"
    )
    assert run(script) == ["True"]


def test_without_numba_pytorch_does_it():
    script = (
        "import logging, sys; sys.modules['numba'] = None\n"
        "logging.basicConfig(stream=sys.stdout, format='%(levelname)s %(name)s %(message)s')\n"
        "import torch\n"
        "from vllm_dpp.pruning import PruningConfig, VideoTokens, keep_indices\n"
        "from vllm_dpp.pruning.dpp.select import fastest_backend\n"
        "print(fastest_backend(torch.device('cpu')))\n"
        "video = VideoTokens(torch.eye(4), None, 2, 2)\n"
        "print(keep_indices([video], PruningConfig())[0].tolist())\n"
        "try: keep_indices([video], PruningConfig(), backend='compiled')\n"
        "except ValueError as error: print(error)\n"
    )
    warning, *lines = run(script)
    assert warning.startswith(
        "WARNING vllm_dpp.pruning.dpp.compiled the compiled loop of the pruner is switched off"
    )
    assert "import of numba halted" in warning and warning.endswith("install numba.")
    assert lines == [
        "torch",
        "[0, 1]",
        "backend 'compiled' needs a CPU and numba, got cpu; leave it out to take what there is",
    ]


def test_without_a_folder_for_machine_code_pytorch_does_it():
    """Numba looks for one when the loop is defined; here it finds none."""
    script = (
        "import logging, sys\n"
        "logging.basicConfig(stream=sys.stdout, format='%(levelname)s %(message)s')\n"
        "import torch\n"
        "from numba.core.caching import CacheImpl\n"
        "CacheImpl._locator_classes = []\n"
        "from vllm_dpp.pruning.dpp.select import fastest_backend\n"
        "print({fastest_backend(torch.device('cpu')) for _ in range(3)})\n"
    )
    warning, backends = run(script)
    assert backends == "{'torch'}"
    assert "WARNING the compiled loop of the pruner is switched off" in warning
    assert "cannot cache function 'greedy_map_loop'" in warning
    assert warning.endswith("set NUMBA_CACHE_DIR to a folder that can be written to.")


def test_a_gpu_is_told_nothing_about_the_cpu(caplog, monkeypatch):
    compiled._compiled_loop.cache_clear()
    monkeypatch.setitem(sys.modules, "vllm_dpp.pruning.dpp.compiled_loop", None)
    try:
        assert not compiled.is_available(torch.device("meta")) and not caplog.messages
        for _ in range(2):
            assert not compiled.is_available(torch.device("cpu"))
        assert len(caplog.messages) == 1
    finally:
        compiled._compiled_loop.cache_clear()


def test_loaded_numba_does_not_keep_the_cpu_worker_of_vllm_from_starting():
    """patches/llvmlite-proxy.md; the first line is what to look at when upstream has changed."""
    script = (
        "import numba, torch\n"
        "from vllm.triton_utils import dispatcher\n"
        "def scan():\n"
        "    try: dispatcher._rebind_kernels([])\n"
        "    except AttributeError as error: return '_lib_fn_wrapper' in str(error)\n"
        "    return 'passed'\n"
        "print(scan())\n"
        "from vllm_dpp.pruning.dpp import compiled\n"
        "assert compiled.is_available(torch.device('cpu'))\n"
        "print(scan())\n"
        "print(numba.njit(lambda x: x + 1)(2))\n"
    )
    assert run(script) == ["True", "passed", "3"]


def run(script):
    """The lines that a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
