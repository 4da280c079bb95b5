"""What the workers of an engine count; the first rank of the first stage counts for all."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Literal, get_args

from prometheus_client import Counter, Histogram
from vllm.distributed import get_pp_group, get_tp_group

from vllm_dpp.serving.kv_size import kv_bytes_of_layer, num_kv_layers
from vllm_dpp.serving.metrics import ProcessMetrics
from vllm_dpp.serving.plan import Grid, MediaSpan, PrunePlan
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.serving.worker.clock import Mark, is_past, mark, seconds

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Part = Literal["entry", "relevance", "choice"]
"""Parts of the selection: what enters; attention of a step's question rows; what is kept at K."""
REMEMBERED = 10_000
BUCKETS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class WorkerMetrics(ProcessMetrics):
    """Args:
    vllm_config: The engine's configuration.
    settings: The engine's settings.
    """

    def __init__(self, vllm_config: "VllmConfig", settings: ServingSettings) -> None:
        self._counts = get_tp_group().is_first_rank and get_pp_group().is_first_rank
        self._on_gpu = vllm_config.device_config.device_type == "cuda"
        decoder = vllm_config.model_config.hf_text_config
        self._kv_layers = num_kv_layers(vllm_config.model_config)
        self._kv_layers_above = decoder.num_hidden_layers - settings.split_layer
        self._bytes = kv_bytes_of_layer(vllm_config)
        self._spans: deque[tuple[Part, Mark, Mark]] = deque()
        self._known: dict[str, None] = {}
        self._encoded: list[tuple[int, int]] = []
        super().__init__("worker", vllm_config, is_shown=self._counts)
        self._tokens = self.add_each(
            Counter,
            "video_tokens",
            "Video tokens of requests (of videos as they are encoded, where none is left out at "
            "layer K): in the video, entering the decoder, kept at layer K",
            "stage",
            ("seen", "entered", "kept"),
        )
        self._saved = self.add(
            Counter, "saved_kv_bytes", "KV bytes that these tokens of requests do not take"
        )
        self._seconds = self.add_each(
            Histogram,
            "selection_seconds",
            "Time of a selection",
            "part",
            get_args(Part),
            buckets=BUCKETS,
        )

    def started(
        self,
        request_id: str,
        media: Sequence[MediaSpan],
        grids: Mapping[int, Grid],
        plan: PrunePlan | None,
    ) -> None:
        """A request starts; one that starts again after a preemption is not counted again.

        Args:
            request_id: vLLM's internal request id.
            media: Its images and videos.
            grids: Slices, rows and columns of the tokens of each, by first prompt position.
            plan: What it loses at layer K.
        """
        if not self._counts or request_id in self._known:
            return
        self._known[request_id] = None
        if len(self._known) > REMEMBERED:
            self._known.pop(next(iter(self._known)))
        seen = sum(prod(grids[item.start]) for item in media if item.is_prunable)
        entered = sum(item.num_tokens for item in media if item.is_prunable)
        self._count(seen, entered, plan.num_pruned if plan else 0)

    def encoded(self, seen: int, entered: int) -> None:
        """Tokens of videos have been encoded, of an engine that leaves none out at layer K.

        There nobody hears of requests. Whether it was for one, the step will tell: memory is
        measured with videos, too.
        """
        self._encoded.append((seen, entered))

    def step(self, *, is_real: bool) -> None:
        """What has been encoded was for a request, or it was not."""
        while self._encoded:
            seen, entered = self._encoded.pop()
            if is_real and self._counts:
                self._count(seen, entered, 0)

    def _count(self, seen: int, entered: int, pruned: int) -> None:
        self._tokens["seen"].inc(seen)
        self._tokens["entered"].inc(entered)
        self._tokens["kept"].inc(entered - pruned)
        left_out = (seen - entered) * self._kv_layers + pruned * self._kv_layers_above
        self._saved.inc(left_out * self._bytes)

    @contextmanager
    def timed(self, part: Part) -> Iterator[None]:
        """Time a part of the selection; on a GPU it counts once the device has done it."""
        if not self._counts:
            yield
            return
        start = mark(on_gpu=self._on_gpu)
        yield
        self._spans.append((part, start, mark(on_gpu=self._on_gpu)))

    def refresh(self) -> None:
        while self._spans and is_past(self._spans[0][2]):
            part, start, end = self._spans.popleft()
            self._seconds[part].observe(seconds(start, end))
