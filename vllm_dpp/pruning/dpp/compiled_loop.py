"""The loop that `compiled` runs. Importing this module needs numba."""

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


# Products may be fused into sums, but sums keep their order: the result is the same every time.
@numba.njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def greedy_map_loop(
    kernel: Floats,
    gains: Floats,
    thresholds: Floats,
    budgets: Integers,
    keep: NDArray[np.bool_],
    order: Integers,
    taken_gains: Floats,
) -> None:
    """Greedy MAP in S segments, one after the other.

    Args:
        kernel: [S, n, n].
        gains: [S, n] initial gains; used up.
        thresholds: [S]; a gain must exceed it to be taken.
        budgets: [S] in [0, n].
        keep: [S, n], becomes True on the tokens taken.
        order: [S, k], gets the token of each step that took one.
        taken_gains: [S, k], gets its gain.
    """
    num_segments, length = gains.shape
    cholesky_rows = np.empty((order.shape[1], length), np.float32)
    for segment in range(num_segments):
        gain = gains[segment]
        for step in range(budgets[segment]):
            token = 0
            for i in range(1, length):
                if gain[i] > gain[token]:  # the lowest index of the largest
                    token = i
            if not gain[token] > thresholds[segment]:
                break
            keep[segment, token] = True
            order[segment, step], taken_gains[segment, step] = token, gain[token]
            row = cholesky_rows[step]
            row[:] = kernel[segment, token]
            _subtract_earlier(row, cholesky_rows, step, token)
            scale = np.float32(1) / np.sqrt(gain[token])
            for i in range(length):
                row[i] *= scale
                gain[i] -= row[i] * row[i]
            gain[token] = -np.inf


@numba.njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _subtract_earlier(row: Floats, cholesky_rows: Floats, step: int, token: int) -> None:
    """Subtract from `row` [n] the first `step` rows, each times what it holds at `token`."""
    length = row.shape[0]
    whole = step - step % 4
    for s in range(0, whole, 4):  # four at a time: `row` is read and written a quarter as often
        a, b = cholesky_rows[s], cholesky_rows[s + 1]
        c, d = cholesky_rows[s + 2], cholesky_rows[s + 3]
        at_a, at_b, at_c, at_d = a[token], b[token], c[token], d[token]
        for i in range(length):
            row[i] -= at_a * a[i] + at_b * b[i] + at_c * c[i] + at_d * d[i]
    for s in range(whole, step):
        earlier = cholesky_rows[s]
        at_token = earlier[token]
        for i in range(length):
            row[i] -= at_token * earlier[i]
