"""What a rule asks of the greedy loop beside relevance: a mixture, an end, and what comes then."""

from typing import NamedTuple

# A gain at or below this fraction of the largest initial gain of its segment is rounding: the
# tokens taken span the others. Past the rank of a kernel, float32 leaves up to 6e-7 of it where
# tokens repeat and 3e-6 where up to 1,024 are mixtures of 512.
RANK_TOLERANCE = 1e-5


class Objective(NamedTuple):
    """In what a rule differs from the plain DPP.

    Args:
        quartic: share of S⁴ in the similarity, in [0, 1).
        least_gain: no token is taken for a gain at or below this fraction of the largest initial
            gain of its segment, in [`RANK_TOLERANCE`, 1).
        rest_in_order: what a budget lacks then goes to the first tokens, not to the most relevant.
    """

    quartic: float = 0.0
    least_gain: float = RANK_TOLERANCE
    rest_in_order: bool = False


PLAIN = Objective()
