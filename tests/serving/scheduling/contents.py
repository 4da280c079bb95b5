"""What every KV slot must hold, as numbers: a function of the prompt's prefix and its plan."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint64]


def _mix(values: Any, salt: Any) -> Numbers:
    """A hash of pairs, elementwise (splitmix64)."""
    with np.errstate(over="ignore"):
        x = np.asarray(values, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = x + np.asarray(salt, np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def of_prefixes(identities: NDArray[np.int64]) -> Numbers:
    """[n]: a number for each prefix that ends with a token; layers that hold all tokens hold it."""
    with np.errstate(over="ignore"):
        return np.cumsum(_mix(identities, np.arange(1, len(identities) + 1)), dtype=np.uint64)


def of_kept(prefixes: Numbers, turns: Sequence[Any]) -> Numbers:
    """[n - pruned]: what layers that hold kept tokens hold, in compact order.

    From a turn's first pruned video to its decision point: a function of everything before that
    point and of how many tokens are kept where. Afterwards: also of the tokens since.
    """
    pieces, seen, start = [], np.uint64(0), 0
    for turn in turns:
        pieces.append(_mix(prefixes[start : turn.start], seen))
        seen = _mix(prefixes[turn.end - 1], seen)
        for video in turn.videos:
            seen = _mix(_mix(seen, video.start), video.num_kept)
        pieces.append(_mix(np.arange(turn.length - turn.num_pruned), seen))
        start = turn.end
    return np.concatenate([*pieces, _mix(prefixes[start:], seen)])


def of_group(index: int, contents: Numbers) -> Numbers:
    """The same in the layers of another KV group."""
    return _mix(contents, index)


class Pages:
    """The KV cache: one number a slot."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.slots = np.zeros((num_blocks, block_size), np.uint64)

    def write(self, table: Sequence[int], start: int, contents: Numbers) -> None:
        """Write positions from ``start`` on through a block table."""
        positions = np.arange(start, start + len(contents))
        blocks, offsets = np.divmod(positions, self.slots.shape[1])
        self.slots[np.asarray(table, np.int64)[blocks], offsets] = contents

    def differs(self, table: Sequence[int], contents: Numbers) -> int | None:
        """The first position that does not hold what it should."""
        held = self.slots[np.asarray(table, np.int64)].reshape(-1)[: len(contents)]
        if np.array_equal(held, contents):
            return None
        return int(np.argmin(held == contents[: len(held)]))
