"""Names of the upper layers' KV blocks, for exact prefix caching through pruned videos.

What an upper-layer block holds is a pure function of the prompt up to the decision point that
governs it, of what is pruned there, and of the tokens that follow. A turn's *digest* stands for the
first two. Counting blocks of compact tokens:

- one that ends before the first pruned video has vLLM's own hash, which all requests share;
- one with pruned videos in or before it that ends before its turn's decision point does is named
  by the turn's digest and its number;
- a later one is named by the digest and vLLM's hash of the full block that it is a shifted copy of.
  (A turn loses whole blocks, so there is one.)

The digest must be in every one of them: requests with other ratios hold other contents under the
same tokens. It covers the tokens up to the decision point and none after it, so that a prompt that
comes again, or n answers to one prompt, find what the first one left.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, overload

from vllm.v1.core.kv_cache_utils import BlockHash, generate_block_hash_extra_keys

from vllm_dpp.serving.plan import PrunedTurn, PrunePlan

if TYPE_CHECKING:
    from vllm.v1.request import Request


class CompactHashes(Sequence[BlockHash]):
    """The names of a request's compact blocks; as many as there are full blocks for.

    Args:
        request: The request, whose own hashes grow as it generates.
        plan: Its plan as the prompt says.
        block_size: Tokens in a block, also of vLLM's hashes.
        settings: Names everything else that kept tokens depend on.
    """

    def __init__(
        self, request: "Request", plan: PrunePlan, block_size: int, settings: bytes
    ) -> None:
        self._full: Sequence[BlockHash] = request.block_hashes
        self._block_size = block_size
        pruned = list(accumulate(turn.num_pruned for turn in plan.turns))
        self._shifts = [tokens // block_size for tokens in pruned]
        self._starts = [turn.start - n for turn, n in zip(plan.turns, [0, *pruned], strict=False)]
        self._ends = [turn.end - n for turn, n in zip(plan.turns, pruned, strict=True)]
        self._digests = _digests(request, plan, block_size, settings)

    def __len__(self) -> int:
        return max(0, len(self._full) - self._shifts[-1])

    @overload
    def __getitem__(self, index: int) -> BlockHash: ...
    @overload
    def __getitem__(self, index: slice) -> list[BlockHash]: ...
    def __getitem__(self, index: int | slice) -> BlockHash | list[BlockHash]:
        if isinstance(index, slice):
            return [self._name(i) for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._name(index)

    def __iter__(self) -> Iterator[BlockHash]:
        return map(self._name, range(len(self)))

    def _name(self, index: int) -> BlockHash:
        end = (index + 1) * self._block_size
        turn = bisect_left(self._starts, end) - 1  # the last that starts before the block ends
        if turn < 0:
            return self._full[index]
        name = index.to_bytes(8, "big")
        if end > self._ends[turn]:
            name = self._full[index + self._shifts[turn]]
        return BlockHash(hashlib.sha256(self._digests[turn] + name).digest())


def _digests(request: "Request", plan: PrunePlan, block_size: int, settings: bytes) -> list[bytes]:
    """For each turn a name of all that the upper layers hold up to its decision point."""
    digests, before = [], settings
    for turn in plan.turns:
        before = hashlib.sha256(before + _name_of_turn(request, turn, block_size)).digest()
        digests.append(before)
    return digests


def _name_of_turn(request: "Request", turn: PrunedTurn, block_size: int) -> bytes:
    """Names what a turn prunes, and the tokens and media up to its decision point."""
    num_whole = turn.end // block_size
    tail = num_whole * block_size
    extra_keys, _ = generate_block_hash_extra_keys(request, tail, turn.end, 0)
    parts = (
        [(video.start, video.length, video.num_kept) for video in turn.videos],
        turn.end,
        bytes(request.block_hashes[num_whole - 1]) if num_whole else b"",
        list(request.all_token_ids[tail : turn.end]),
        extra_keys,
    )
    return repr(parts).encode()


class HashedAs:
    """A request as the block pool sees it, with other block hashes."""

    def __init__(self, request: "Request", block_hashes: Sequence[BlockHash]) -> None:
        self._request = request
        self.block_hashes = block_hashes

    def __getattr__(self, name: str) -> object:
        return getattr(self._request, name)
