# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment"
# Triton compiles these functions; Python's types do not describe the values in them.
"""The two Triton kernels of `fused`, which explains what they are for. Imports Triton.

Arithmetic does not depend on how the threads of a program share the work, so the sizes that a
kernel is compiled for change no bit of a result: sums over features or Cholesky rows run in the
order written here, one `fma` each, and what threads reduce together is a maximum, exact in any
order.

Memory order. What one thread writes to global memory and another of the same program reads needs a
barrier in between: the Cholesky rows, gains, scales and `keep`. And what is read may not be
overwritten before the next barrier: where a program has more threads than values, several load the
same one, and a late one would see what an early one has just stored. So the gains alternate between
two buffers. Triton's interpreter runs one thread and shows neither mistake.
"""

import triton
import triton.language as tl

from vllm_dpp.pruning.rows import NORM_EPSILON

# The width of workspaces is a multiple of this, so that whole vectors are loaded.
COLUMNS = 32

_COLUMNS = tl.constexpr(COLUMNS)
_EPSILON = tl.constexpr(NORM_EPSILON)


@triton.jit(do_not_specialize=["offsets", "budgets", "first_segment"])
def gram_kernel(
    features,  # [N, dim], rows `row_stride` apart
    products,  # [rows, width] float32: a row per token of the batch, a column per token beside it
    offsets,  # [S + 1] int64
    budgets,  # [S] int64
    dim,
    row_stride,
    width,
    first_segment,
    tile: tl.constexpr,
    depth: tl.constexpr,
    partial: tl.constexpr,
    precision: tl.constexpr,
    upcast: tl.constexpr,
):
    """Products of the rows of a segment with one another.

    Program (i, j, s): tile [i, j] of segment `first_segment + s`, and its mirror image.
    """
    segment = first_segment + tl.program_id(2)
    start = tl.load(offsets + segment)
    length = (tl.load(offsets + segment + 1) - start).to(tl.int32)
    first_row = tl.program_id(0) * tile
    first_column = tl.program_id(1) * tile
    needed = tl.load(budgets + segment) > 0
    if (first_row < length) & (first_column <= first_row) & needed:
        rows = first_row + tl.arange(0, tile)
        columns = first_column + tl.arange(0, tile)
        places = tl.arange(0, depth)
        within = tl.arange(0, tile)[:, None] * row_stride + places[None, :]
        # `start` is int64: large batches have more values than int32 counts.
        left = features + (start + first_row) * row_stride
        right = features + (start + first_column) * row_stride
        total = tl.zeros((tile, tile), tl.float32)
        for begin in range(0, dim, partial):
            # Tensor cores cut off the bits that do not fit. In one sum of thousands of features
            # the loss would exceed the rank tolerance; in short ones it is that of rounding.
            part = tl.zeros((tile, tile), tl.float32)
            for at in range(begin, tl.minimum(begin + partial, dim), depth):
                known = (places < dim - at)[None, :]
                a = tl.load(left + at + within, mask=(rows < length)[:, None] & known, other=0.0)
                b = tl.load(
                    right + at + within, mask=(columns < length)[:, None] & known, other=0.0
                )
                if upcast:
                    a, b = a.to(tl.float32), b.to(tl.float32)
                part = tl.dot(a, tl.trans(b), part, input_precision=precision)
            total += part
        products += (start - tl.load(offsets + first_segment)) * width
        # Columns past the segment, up to a multiple of COLUMNS, are read: zeros, unless NaN.
        at_tile = products + rows.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(at_tile, total, mask=(rows < length)[:, None] & (columns < width)[None, :])
        if first_column < first_row:
            at_mirror = products + columns.to(tl.int64)[:, None] * width + rows[None, :]
            inside = (columns < length)[:, None] & (rows < width)[None, :]
            tl.store(at_mirror, tl.trans(total), mask=inside)


@triton.jit(
    do_not_specialize=[
        "relevance",
        "offsets",
        "budgets",
        "row_starts",
        "keep",
        "order",
        "gains",
        "max_budget",
        "first_segment",
        "quartic",
        "least_gain",
    ]
)
def greedy_kernel(
    products,  # [rows, width] float32, from `gram_kernel`
    cholesky_rows,  # [rows, width] float32, workspace
    vectors,  # [segments, 3, width] float32, workspace: scales of products, and the gains twice
    relevance,  # [N] float32
    offsets,  # [S + 1] int64
    budgets,  # [S] int64, each at most the tokens of its segment
    row_starts,  # [S] int64, sum of the budgets before
    keep,  # [N] int8, zeros
    order,  # [S, max_budget] int64, all -1
    gains,  # [S, max_budget] float32, zeros
    width,
    max_budget,
    first_segment,
    quartic,
    least_gain,
    is_mixed: tl.constexpr,
    rest_in_order: tl.constexpr,
    block: tl.constexpr,
    unroll: tl.constexpr,
):
    """The whole selection of segment `first_segment + s`, in program s."""
    place = tl.program_id(0).to(tl.int64)
    segment = first_segment + place
    start = tl.load(offsets + segment)
    length = (tl.load(offsets + segment + 1) - start).to(tl.int32)
    budget = tl.load(budgets + segment).to(tl.int32)
    products += (start - tl.load(offsets + first_segment)) * width
    cholesky_rows += (tl.load(row_starts + segment) - tl.load(row_starts + first_segment)) * width
    scales = vectors + place * 3 * width
    marginal_gain = scales + width
    relevance += start
    keep += start
    order += segment * max_budget
    gains += segment * max_budget
    step = tl.full((), 0, tl.int32)
    if budget > 0:
        best, token = _first_gains(
            products,
            relevance,
            scales,
            marginal_gain,
            length,
            width,
            quartic,
            is_mixed,
            block,
        )
        needed = best * least_gain
        tl.debug_barrier()
        # An infinite gain stands for NaN, which stops the segment as it does in PyTorch.
        while (step < budget) & (best > needed) & (best < float("inf")):
            tl.store(order + step, token.to(tl.int64))
            tl.store(gains + step, best)
            tl.store(keep + token, 1)
            before = marginal_gain + (step % 2) * width
            after = marginal_gain + (1 - step % 2) * width
            best, token = _take(
                products,
                cholesky_rows,
                scales,
                relevance,
                before,
                after,
                token,
                step,
                tl.rsqrt(best),
                length,
                width,
                quartic,
                is_mixed,
                block,
                unroll,
            )
            step += 1
            tl.debug_barrier()
    while step < budget:
        token = _next(relevance, keep, length, rest_in_order, block)
        tl.debug_barrier()  # all threads have read `keep`
        tl.store(keep + token, 1)
        step += 1
        tl.debug_barrier()


@triton.jit
def _first_gains(
    products,
    relevance,
    scales,
    marginal_gain,
    length,
    width,
    quartic,
    is_mixed: tl.constexpr,
    block: tl.constexpr,
):
    """Write `scales` and `marginal_gain`; return the largest gain and its token."""
    best = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    padded = tl.cdiv(length, _COLUMNS) * _COLUMNS
    for first in range(0, padded, block):
        columns = first + tl.arange(0, block)
        inside, real = columns < padded, columns < length
        # Norms come from the products, not from the rows: what a tensor core lost of a product,
        # it lost of these too, so that repeated tokens still leave no gain.
        square = tl.load(products + columns.to(tl.int64) * (width + 1), mask=real, other=0.0)
        norm = tl.sqrt_rn(square)
        r = tl.load(relevance + columns, mask=real, other=0.0)
        # Correctly rounded, norm / norm is 1, and tokens of equal relevance tie exactly.
        unit = tl.div_rn(norm, norm + _EPSILON)
        scale = tl.div_rn(r, norm + _EPSILON)
        if is_mixed:
            cube = unit * unit * unit
            unit *= tl.sqrt_rn(1 - quartic + quartic * cube * cube)
            scale = tl.div_rn(1.0, norm + _EPSILON)  # S is what is mixed, r comes after
        root = r * unit
        gain = tl.where(real, root * root, float("-inf"))
        tl.store(scales + columns, scale, mask=inside)
        tl.store(marginal_gain + columns, gain, mask=inside)
        best, token = _better(best, token, gain, first)
    return best, token


@triton.jit
def _take(
    products,
    cholesky_rows,
    scales,
    relevance,
    before,
    after,
    token,
    step,
    inverse_root,
    length,
    width,
    quartic,
    is_mixed: tl.constexpr,
    block: tl.constexpr,
    unroll: tl.constexpr,
):
    """Write Cholesky row `step` and the gains `after`; return the best of these and its token."""
    best = tl.full((), float("-inf"), tl.float32)
    next_token = tl.full((), 0, tl.int32)
    scale = tl.load(scales + token)
    padded = tl.cdiv(length, _COLUMNS) * _COLUMNS
    for first in range(0, padded, block):
        columns = first + tl.arange(0, block)
        inside = columns < padded
        gain = tl.load(before + columns, mask=inside, other=float("-inf"))
        row = tl.load(products + token.to(tl.int64) * width + columns, mask=inside, other=0.0)
        row = row * scale * tl.load(scales + columns, mask=inside, other=0.0)
        if is_mixed:
            row *= 1 - quartic + quartic * row * row * row
            row *= tl.load(relevance + token)
            row *= tl.load(relevance + columns, mask=columns < length, other=0.0)
        # The next rows are on their way while these are used. Carried round the loop, the loads
        # are issued together; written inside it, the assembler would wait for each in turn.
        earlier = cholesky_rows
        at_token, rows = _next_rows(earlier, columns, token, step, padded, width, unroll)
        for done in range(unroll, step + unroll, unroll):
            earlier += unroll * width
            ahead = _next_rows(earlier, columns, token, step - done, padded, width, unroll)
            for i in tl.static_range(unroll):
                row = tl.fma(-at_token[i], rows[i], row)
            at_token, rows = ahead
        row *= inverse_root
        tl.store(cholesky_rows + step.to(tl.int64) * width + columns, row, mask=inside)
        # Rounding may leave a gain below zero, which is below what is needed: no clamp.
        gain = tl.where(columns == token, float("-inf"), tl.fma(-row, row, gain))
        tl.store(after + columns, gain, mask=inside)
        best, next_token = _better(best, next_token, gain, first)
    return best, next_token


@triton.jit
def _next_rows(rows, columns, token, left, padded, width, unroll: tl.constexpr):
    """The next `unroll` Cholesky rows at `token`, and at `columns`; zeros when `left` run out."""
    at_token, at_columns = (), ()
    for i in tl.static_range(unroll):
        written = columns < tl.where(i < left, padded, 0)
        at_token += (tl.load(rows + token, mask=i < left, other=0.0),)
        at_columns += (tl.load(rows + columns, mask=written, other=0.0),)
        rows += width
    return at_token, at_columns


@triton.jit
def _next(relevance, keep, length, in_order: tl.constexpr, block: tl.constexpr):
    """The token of largest relevance, or the first, of those that are not kept."""
    best = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    for first in range(0, length, block):
        columns = first + tl.arange(0, block)
        real = columns < length
        kept = tl.load(keep + columns, mask=real, other=1)
        if in_order:
            r = tl.zeros((block,), tl.float32)
        else:
            r = tl.load(relevance + columns, mask=real, other=0.0)
        best, token = _better(best, token, tl.where(kept != 0, float("-inf"), r), first)
    return token


@triton.jit
def _better(best, token, values, first):
    """The larger of `best` and the largest of `values`, and whose it is; ties stay lowest.

    NaN counts as infinity.
    """
    values = tl.where(values == values, values, float("inf"))
    largest, at = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
    return tl.maximum(best, largest), tl.where(largest > best, first + at, token)
