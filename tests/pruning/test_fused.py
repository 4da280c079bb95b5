"""The Triton kernels: in Triton's interpreter, compiled for GPUs that are not here, and on one.

What the interpreter cannot show, because it runs a program in one thread, is a missing barrier:
the tests marked `gpu` are the same ones on a GPU, and more.
"""

import functools
import json
import os
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dpp.pruning import naive_greedy_map
from vllm_dpp.pruning.dpp.fused import greedy_map_fused, is_available
from vllm_dpp.pruning.dpp.greedy_map import Selection, greedy_map
from vllm_dpp.pruning.dpp.kernel import conditioned_kernel

from .helpers import reference_kernel
from .test_greedy_map import DTYPES, KINDS, check_segment, make_features

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")


# Answers calls of `greedy_map_fused`, pickled on its standard input, until that ends.
SERVE = """
import pickle, sys, torch
from vllm_dpp.pruning.dpp.fused import greedy_map_fused
torch.set_num_threads(1)
while sys.stdin.buffer.peek(1):
    inputs, sizes = pickle.load(sys.stdin.buffer)
    pickle.dump(tuple(greedy_map_fused(*inputs, **sizes)), sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""


@pytest.fixture(scope="module")
def interpreter():
    """A process that interprets. Triton chooses when it is imported, and may be imported here."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVE],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:

        def call(inputs, sizes):
            pickle.dump((inputs, sizes), process.stdin)
            process.stdin.flush()
            return Selection(*pickle.load(process.stdout))

        yield call


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def fused(request):
    """`greedy_map_fused` on CPU tensors, wherever it runs."""

    def run(features, relevance, offsets, budgets, longest=None, max_budget=None, limit=1 << 28):
        longest = max(b - a for a, b in pairwise(offsets)) if longest is None else longest
        max_budget = max(budgets) if max_budget is None else max_budget
        inputs = features, relevance, torch.tensor(offsets), torch.tensor(budgets)
        sizes = {"longest": longest, "max_budget": max_budget, "max_kernel_bytes": limit}
        if request.param == "cuda":
            selection = greedy_map_fused(*(tensor.cuda() for tensor in inputs), **sizes)
            return Selection(*(tensor.cpu() for tensor in selection))
        return request.getfixturevalue("interpreter")(inputs, sizes)

    return run


def by_segment(selection, offsets):
    """Per segment: the kept tokens, the greedy order and its gains."""
    for (start, end), order, gains in zip(
        pairwise(offsets), selection.order, selection.gains, strict=True
    ):
        taken = order >= 0
        keep = selection.keep[start:end].nonzero().flatten().tolist()
        yield keep, order[taken].tolist(), gains[taken]


def check(fused, features, relevance, offsets, budgets, **sizes):
    selection = fused(features, relevance, offsets, budgets, **sizes)
    spans = [slice(*span) for span in pairwise(offsets)]
    for span, budget, result in zip(spans, budgets, by_segment(selection, offsets), strict=True):
        if span.stop > span.start:
            check_segment(features[span], relevance[span], budget, result)
    return selection


def random_problem(lengths, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    offsets = [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    features = torch.randn(offsets[-1], dim, generator=generator)
    return features, 0.1 + 0.9 * torch.rand(offsets[-1], generator=generator), offsets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_segments_against_the_reference(fused, dtype, kind):
    generator = torch.Generator().manual_seed(0)
    features = make_features(kind, 94, 80, generator).to(dtype)
    relevance = 0.1 + 0.9 * torch.rand(94, generator=generator)
    check(fused, features, relevance, [0, 1, 64, 64, 80, 81, 94], [1, 12, 0, 16, 0, 7])


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 14).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))),
    kind=st.sampled_from(KINDS),
    dim=st.sampled_from([1, 3, 16, 40]),
    seed=st.integers(0, 1000),
    spare=st.integers(0, 3),
)
def test_random_shapes_against_the_reference(fused, sizes, kind, dim, seed, spare):
    lengths, budgets = [n for n, _ in sizes], [k for _, k in sizes]
    _, relevance, offsets = random_problem(lengths, dim, seed)
    features = make_features(kind, offsets[-1], dim, torch.Generator().manual_seed(seed))
    longest, max_budget = max([0, *lengths]) + spare, max([0, *budgets]) + spare
    selection = check(
        fused, features, relevance, offsets, budgets, longest=longest, max_budget=max_budget
    )
    assert selection.order.shape == selection.gains.shape == (len(sizes), max_budget)
    idle = selection.order < 0
    assert (selection.order[idle] == -1).all() and (selection.gains[idle] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_thousand_tokens(fused, dtype):
    features, relevance, offsets = random_problem([63, 1000], 48)
    check(fused, features.to(dtype), relevance, offsets, [9, 17])


def test_all_of_63_tokens(fused):
    features, relevance, offsets = random_problem([63], 144)
    [(_, order, _)] = by_segment(check(fused, features, relevance, offsets, [63]), offsets)
    assert len(order) == 63


def test_more_tokens_than_a_program_holds_at_once(fused):
    features, relevance, offsets = random_problem([2100], 24)
    relevance[[7, 2090]] = 2.0  # one in either part
    relevance[[11, 2060]] = 1.5  # a tie between the parts
    features[[7, 2090, 11, 2060]] = torch.eye(24)[:4]
    selection = check(fused, features.bfloat16(), relevance, offsets, [6])
    [(_, order, _)] = by_segment(selection, offsets)
    assert order[:4] == [7, 2090, 11, 2060]


def test_more_features_than_one_sum_takes(fused):
    features, relevance, offsets = random_problem([40, 24], 1100)
    check(fused, features, relevance, offsets, [20, 24])


def test_rows_of_a_wider_tensor(fused):
    features, relevance, offsets = random_problem([30, 17], 96)
    selection = check(fused, features[:, 8:45], relevance, offsets, [12, 9])
    copied = fused(features[:, 8:45].contiguous(), relevance, offsets, [12, 9])
    assert torch.equal(selection.gains, copied.gains)


def test_same_choice_as_the_loop_in_pytorch(fused):
    features, relevance, offsets = random_problem([32, 32, 32], 200)
    selection = fused(features, relevance, offsets, [32, 0, 17])
    weights, valid = relevance.view(3, 32), torch.ones(3, 32, dtype=torch.bool)
    kernel = conditioned_kernel(features.view(3, 32, 200), weights)
    expected = greedy_map(kernel, weights, valid, torch.tensor([32, 0, 17]), 32)
    assert torch.equal(selection.keep, expected.keep.flatten())
    assert torch.equal(selection.order, expected.order)
    assert torch.allclose(selection.gains, expected.gains, atol=1e-5)


def test_tokens_of_equal_relevance_tie_at_first(fused):
    """The first choice must not hang on how the norms were rounded."""
    features = torch.randn(63, 200, generator=torch.Generator().manual_seed(9)) * 7
    [(_, order, _)] = by_segment(fused(features, torch.ones(63), [0, 63], [20]), [0, 63])
    assert order == naive_greedy_map(reference_kernel(features, torch.ones(63)), 20, [1.0] * 63)
    assert order[0] == 0


def test_ties_go_to_the_lowest_index(fused):
    relevance = torch.tensor([1.0, 1, 1, 1, 1, 1, 0.1, 0.9, 0.5, 0.9])
    features = torch.cat([torch.eye(6), torch.zeros(4, 6)])
    results = list(by_segment(fused(features, relevance, [0, 6, 10], [3, 3]), [0, 6, 10]))
    assert [result[:2] for result in results] == [([0, 1, 2], [0, 1, 2]), ([1, 2, 3], [])]
    assert fused(torch.ones(6, 4), torch.ones(6), [0, 6], [3]).order.tolist() == [[0, -1, -1]]


def test_neighbours_change_no_bit(fused):
    """Nor does the power of two that a kernel is compiled for."""
    lengths, budgets = [40, 300, 17, 129], [20, 9, 17, 11]
    features, relevance, offsets = random_problem(lengths, 70)
    together = fused(features, relevance, offsets, budgets)
    for s, (start, end) in enumerate(pairwise(offsets)):
        own = features[start:end], relevance[start:end], [0, end - start], [budgets[s]]
        alone = fused(*own)
        assert torch.equal(together.keep[start:end], alone.keep)
        assert torch.equal(together.order[s, : budgets[s]], alone.order[0])
        assert torch.equal(together.gains[s, : budgets[s]], alone.gains[0])


@pytest.mark.parametrize("limit", [1, 4 * 64 * 60 * 2, 4 * 64 * 60 * 3])
def test_bounded_memory_changes_no_bit(fused, limit):
    features, relevance, offsets = random_problem([40, 3, 60, 17, 33], 50)
    budgets = [5, 3, 8, 0, 12]
    for free, bounded in zip(
        fused(features, relevance, offsets, budgets),
        fused(features, relevance, offsets, budgets, limit=limit),
        strict=True,
    ):
        assert torch.equal(free, bounded)


@pytest.mark.parametrize(
    ("dtype", "bad"), list(zip(DTYPES, [torch.nan, torch.inf, -torch.inf], strict=True))
)
def test_a_bad_number_still_keeps_the_budget_and_leaves_neighbours_alone(fused, dtype, bad):
    features, relevance, offsets = random_problem([20, 45, 20], 33)
    features, budgets = features.to(dtype), [5, 30, 5]
    sound = fused(features, relevance, offsets, budgets)
    features[20 + 13, 5] = bad
    selection = fused(features, relevance, offsets, budgets)
    assert selection.keep[20:65].sum() == 30 and (selection.order[1] == -1).all()
    by_relevance = relevance[20:65].argsort(descending=True, stable=True)[:30]
    assert selection.keep[20:65][by_relevance].all()
    for span, s in ((slice(0, 20), 0), (slice(65, 85), 2)):
        assert torch.equal(selection.keep[span], sound.keep[span])
        assert torch.equal(selection.order[s], sound.order[s])


def test_nothing_but_bad_numbers(fused):
    features, relevance = torch.full((50, 8), torch.nan), torch.full((50,), torch.nan)
    assert fused(features, relevance, [0, 50], [21]).keep.nonzero().flatten().tolist() == [
        *range(21)
    ]


def test_products_past_float32(fused):
    features, relevance, offsets = random_problem([30], 16)
    selection = fused(features * 1e20, relevance, offsets, [9])
    assert selection.keep.sum() == 9


def test_no_work_at_all(fused):
    empty = torch.zeros(0, 4), torch.zeros(0)
    assert fused(*empty, [0], [], longest=0, max_budget=0).keep.shape == (0,)
    assert fused(*empty, [0, 0], [0], longest=0, max_budget=2).order.tolist() == [[-1, -1]]
    assert not fused(torch.ones(3, 4), torch.ones(3), [0, 3], [0]).keep.any()


def test_bad_features():
    for features in (torch.zeros(4, 3).double(), torch.zeros(4), torch.zeros(3, 4).T):
        with pytest.raises(ValueError, match="features must be"):
            greedy_map_fused(
                features, torch.ones(4), torch.tensor([0, 4]), torch.tensor([1]), 4, 1,
                max_kernel_bytes=1,
            )  # fmt: skip


def test_the_module_needs_no_triton():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from vllm_dpp.pruning.dpp.fused import is_available\n"
        "print(is_available(torch.device('cpu')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


# Calls the host side as a GPU of capability argv[1] would be called, and compiles what it would
# launch. Prints per call the kernels compiled for it, as [name, registers, stack, shared, PTX].
COMPILE = """
import os, re, subprocess, sys, tempfile, types
os.environ.pop("TRITON_INTERPRET", None)
import json, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_dpp.pruning.dpp.fused import greedy_map_fused

target = GPUTarget("cuda", int(sys.argv[1]), 32)
triton.runtime.driver.set_active(types.SimpleNamespace(
    get_current_target=lambda: target,
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
))
seen, news = set(), []

def compile_instead_of_launching(key, fn, compile, **rest):
    if (fn.name, key) not in seen:
        seen.add((fn.name, key))
        news.append([fn.name, compile["num_warps"], *resources(fn.jit_function, compile)])
    return True

def resources(function, launch):
    constants = dict(launch["constants"])
    if "upcast" in function.arg_names:
        constants[function.arg_names.index("upcast"),] = False  # True for the interpreter alone
    source = ASTSource(function, launch["signature"], constants, launch["configs"][0])
    names = "num_warps", "num_stages", "enable_fp_fusion"
    kernel = triton.compile(source, target=target, options={name: launch[name] for name in names})
    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        tool = [os.path.join(folder, "cuobjdump"), "--dump-resource-usage", cubin.name]
        usage = subprocess.check_output(tool, text=True)
    registers, stack = (int(re.search(f"{name}:(\\\\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack, kernel.metadata.shared, kernel.asm["ptx"]

triton.knobs.runtime.jit_cache_hook = compile_instead_of_launching
for dtype, dim, lengths, budget, skipped in json.loads(sys.argv[2]):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    num_tokens = int(offsets[-1])
    features = torch.empty(num_tokens + skipped, dim, dtype=getattr(torch, dtype))[skipped:]
    relevance = torch.ones(num_tokens + skipped)[skipped:]
    offsets = torch.cat([torch.zeros(skipped, dtype=torch.int64), offsets])[skipped:]
    greedy_map_fused(
        features, relevance, offsets, torch.full((len(lengths),), budget), max(lengths), budget,
        max_kernel_bytes=1 << 20,
    )
    print(json.dumps(news))
    news.clear()
"""


# dtype, D, lengths, budget, tokens of the tensors that belong to others.
CALLS = [
    ("bfloat16", 64, [200, 200], 50, 0),
    ("bfloat16", 64, [131], 1, 1),
    ("bfloat16", 64, [256, 1, 16], 16, 3),
    ("bfloat16", 64, [255] * 9, 33, 7),
    ("bfloat16", 64, [257], 33, 0),
    ("bfloat16", 64, [100], 4, 0),
    ("bfloat16", 64, [1000], 4, 0),
    ("bfloat16", 64, [3000], 4, 0),
    ("bfloat16", 64, [1100, 1100], 4, 0),
    ("float16", 64, [100], 4, 0),
    ("float32", 64, [100], 4, 0),
]


@functools.cache
def compiled(capability):
    """Per call, what it compiles that none before it did."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability), json.dumps(CALLS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_only_a_new_power_of_two_or_dtype_compiles_anything():
    gram, greedy = "gram_kernel", "greedy_kernel"
    expected = [[gram, greedy], [], [], [], [greedy], [greedy], [greedy], [greedy], [], [gram]]
    assert [[name for name, *_ in news] for news in compiled(90)] == [*expected, [gram]]


@pytest.mark.parametrize(("capability", "shared_kilobytes"), [(80, 163), (90, 227)])
def test_the_kernels_fit_on_a_gpu(capability, shared_kilobytes):
    kernels = [kernel for news in compiled(capability) for kernel in news]
    assert len(kernels) == 3 + 5
    for _, warps, registers, stack, shared, ptx in kernels:
        assert registers * warps * 32 <= 65536
        assert stack <= 32  # bytes of spilled registers
        assert shared <= shared_kilobytes * 1024
        assert "ld.global.nc" not in ptx  # a cache that does not see what the program wrote


@pytest.fixture
def video():
    """16 ragged segments of bfloat16 rows on a GPU, and its selection's arguments."""
    lengths = [512, 300, 511, 512, 1, 77, 400, 512] * 2
    features, relevance, offsets = random_problem(lengths, 1024)
    budgets = [length // 4 for length in lengths]
    inputs = features.bfloat16(), relevance, torch.tensor(offsets), torch.tensor(budgets)
    sizes = {"longest": 512, "max_budget": 128, "max_kernel_bytes": 1 << 28}
    return [tensor.cuda() for tensor in inputs], sizes, offsets, budgets


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_nothing_races(video):
    inputs, sizes, offsets, budgets = video
    assert is_available(inputs[0].device)
    first = greedy_map_fused(*inputs, **sizes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        repeated = [greedy_map_fused(*inputs, **sizes) for _ in range(50)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for again in repeated:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    features, relevance = (tensor.cpu() for tensor in inputs[:2])
    results = by_segment(Selection(*(tensor.cpu() for tensor in first)), offsets)
    for (start, end), budget, result in zip(pairwise(offsets), budgets, results, strict=True):
        check_segment(features[start:end], relevance[start:end], budget, result)


@pytest.mark.gpu
def test_a_cuda_graph_replays_on_other_features_offsets_and_budgets(video):
    inputs, sizes, _, _ = video
    greedy_map_fused(*inputs, **sizes)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        replayed = greedy_map_fused(*inputs, **sizes)
    features, relevance, offsets, budgets = inputs
    features.copy_(features.flip(0))
    relevance.copy_(relevance.flip(0))
    offsets.copy_(offsets[-1] - offsets.flip(0))
    budgets.copy_(budgets.flip(0) // 2)
    graph.replay()
    expected = greedy_map_fused(*inputs, **sizes)
    assert int(expected.keep.sum()) == int(budgets.sum())
    assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))
