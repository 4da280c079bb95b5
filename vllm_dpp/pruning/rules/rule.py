"""What a rule is.

A rule says which tokens of a video are kept. How many is never its business: that is settled, as
`num_kept`, before there is any data, and lengths, blocks and budgets everywhere depend on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from vllm_dpp.pruning.config import PruningConfig
from vllm_dpp.pruning.dpp.select import Backend
from vllm_dpp.pruning.video import VideoTokens


@dataclass(frozen=True, slots=True)
class Means:
    """By what means a rule may compute; its result does not depend on them.

    Args:
        backend: how a DPP selects, see `dpp.select`; None takes the fastest that the device has.
        group: ranks that hold the same videos and may share the work.
    """

    backend: Backend | None = None
    group: ProcessGroup | None = None


Rule = Callable[[Sequence[VideoTokens], PruningConfig, Means], list[Tensor]]
"""From videos, of each of which more than 0 and fewer than N tokens are to be kept, to per video
[num_kept] int64 token indices, ascending, on the device of its features. What is kept of a video
depends on nothing but itself and the configuration. On a GPU a rule reads nothing on the host.
"""


def each(keep: Callable[[VideoTokens], Tensor]) -> Rule:
    """The rule that looks at one video after the other and has no settings."""

    def rule(videos: Sequence[VideoTokens], config: PruningConfig, means: Means) -> list[Tensor]:
        return [keep(video) for video in videos]

    return rule
