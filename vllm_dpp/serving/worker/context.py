"""What model runner and model share on one worker: plans of live requests, and the next step.

The runner fills it (``add_request``, ``prepare_step``), the model's forward pass takes the layout
(``take_layout``). One context belongs to one model; nothing is global.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_dpp.serving.plan import PrunePlan
from vllm_dpp.serving.request_plan import RequestOptions, plan_request
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.serving.step import ScheduledRequest, StepLayout, lay_out

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.sampling_params import SamplingParams

Grid = tuple[int, int, int]
"""Slices, rows and columns of a video's tokens."""


@dataclass(frozen=True, slots=True)
class PrunedRequest:
    """A live request that loses tokens.

    Args:
        plan: Its prune plan.
        grids: The token grid of each of its media, by first prompt position.
        record: Whether it asked for a record.
    """

    plan: PrunePlan
    grids: dict[int, Grid]
    record: bool


class PruningContext:
    """Plans of the requests on this worker, and the layout of the step about to run."""

    def __init__(
        self,
        settings: ServingSettings,
        grids_of: Callable[[Sequence["MultiModalFeatureSpec"]], dict[int, Grid]],
    ) -> None:
        """Args:
        settings: The engine's settings.
        grids_of: Reads the token grids of a request's media.
        """
        self.settings = settings
        self.requests: dict[str, PrunedRequest] = {}
        self.block_size: int | None = None
        self._grids_of = grids_of
        self._layout: StepLayout | None = None

    def set_block_size(self, block_size: int | None) -> None:
        """KV block size where prefix caching is on, else ``None``: as the scheduler plans."""
        self.block_size = block_size

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int] | None,
        mm_features: Sequence["MultiModalFeatureSpec"],
        sampling_params: "SamplingParams | None",
    ) -> None:
        """Plan a request that arrives on this worker, again after a preemption."""
        self.requests.pop(request_id, None)
        plan = plan_request(
            prompt_token_ids, mm_features, sampling_params, self.settings, self.block_size
        )
        if plan is not None and sampling_params is not None:
            options = RequestOptions.from_extra_args(sampling_params.extra_args)
            grids = self._grids_of(mm_features)
            self.requests[request_id] = PrunedRequest(plan, grids, options.record)

    def remove_request(self, request_id: str) -> None:
        self.requests.pop(request_id, None)

    def prepare_step(self, batch: Iterable[tuple[str, int, int]]) -> StepLayout | None:
        """Lay out the next step from (request id, tokens computed, tokens scheduled) triples."""
        self._layout = None
        if self.requests:
            self._layout = lay_out(
                [
                    ScheduledRequest(request_id, self._plan(request_id), computed, scheduled)
                    for request_id, computed, scheduled in batch
                ]
            )
        return self._layout

    def _plan(self, request_id: str) -> PrunePlan | None:
        request = self.requests.get(request_id)
        return None if request is None else request.plan

    @property
    def layout(self) -> StepLayout | None:
        """The layout of the step about to run, ``None`` where every row is kept."""
        return self._layout

    def take_layout(self) -> StepLayout | None:
        """The layout, once: a dummy run that follows finds none."""
        layout, self._layout = self._layout, None
        return layout
