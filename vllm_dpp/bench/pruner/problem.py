"""The videos that the pruner benchmark selects from: their sizes and their features."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_dpp.pruning import PruningConfig, VideoTokens, normalize_relevance

CLUSTERS = 32
DRIFT = 0.1  # how far cluster centres move from one segment to the next, of their length
NOISE = 0.5  # of a token about its centre, in lengths of a centre
DESCRIPTION = (
    f"each token is one of {CLUSTERS} cluster centres plus noise of {NOISE} times its length, so "
    "tokens of a cluster have a cosine of about 0.8; centres drift from segment to segment; "
    "lengths are log-normal; raw relevance is uniform"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The size of one video.

    Args:
        dim: features of a token, D.
        num_segments: segments, of equal length and budget.
        tokens_per_segment: tokens of each, n.
        kept_per_segment: tokens kept of each, k.
        series: what cases of growing N have in common, where they are drawn as one line.
    """

    dim: int
    num_segments: int
    tokens_per_segment: int
    kept_per_segment: int
    series: str | None = None

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.num_segments * self.tokens_per_segment

    @property
    def num_kept(self) -> int:
        """Tokens kept of the whole video."""
        return self.num_segments * self.kept_per_segment

    def __str__(self) -> str:
        return (
            f"N {self.num_tokens}, D {self.dim}: {self.num_segments} segments of "
            f"{self.tokens_per_segment} tokens, {self.kept_per_segment} kept of each"
        )


@dataclass(frozen=True, eq=False)
class Problem:
    """One video.

    Args:
        case: its size.
        features: [N, D] float, segment by segment.
        raw_relevance: [N] float32 on the same device.
        segment_ids: [N] int64, the segment of each token; for code that cuts by them.
        settings: how relevance is formed, and that a segment is a slice.
    """

    case: Case
    features: Tensor
    raw_relevance: Tensor
    segment_ids: Tensor
    settings: PruningConfig

    @property
    def by_segment(self) -> Tensor:
        """[S, n, D] view of the features."""
        return self.features.view(self.case.num_segments, self.case.tokens_per_segment, -1)

    @property
    def video(self) -> VideoTokens:
        """The input of `keep_indices`: a slice is a segment."""
        case = self.case
        return VideoTokens(self.features, self.raw_relevance, case.num_kept, case.num_segments)

    def relevance(self) -> Tensor:
        """[N] float32 relevance, normalised over the whole video."""
        settings = self.settings
        return normalize_relevance(
            self.raw_relevance, settings.relevance_sign, settings.relevance_floor
        )

    def first(self, num_segments: int) -> "Problem":
        """The video cut off after some segments; shares its memory."""
        case = replace(self.case, num_segments=num_segments)
        tokens = slice(case.num_tokens)
        return Problem(
            case,
            self.features[tokens],
            self.raw_relevance[tokens],
            self.segment_ids[tokens],
            self.settings,
        )


def make_problem(
    case: Case, *, seed: int, dtype: torch.dtype, device: torch.device, settings: PruningConfig
) -> Problem:
    """Draw a video; the same on every device.

    Args:
        case: its size.
        seed: of everything drawn.
        dtype: of the features.
        device: where they go.
        settings: of relevance.
    """
    generator = torch.Generator().manual_seed(seed)
    features = _features(case, generator).to(dtype)
    raw_relevance = torch.rand(case.num_tokens, generator=generator)
    segment_ids = torch.arange(case.num_segments).repeat_interleave(case.tokens_per_segment)
    settings = replace(
        settings,
        segment_by="slices",
        slices_per_segment=1,
        max_segment_tokens=None,
        budget="length",
    )
    return Problem(
        case, features.to(device), raw_relevance.to(device), segment_ids.to(device), settings
    )


def _features(case: Case, generator: torch.Generator) -> Tensor:
    """[N, D] float32; see `DESCRIPTION`."""
    features = torch.empty(case.num_segments, case.tokens_per_segment, case.dim)
    centres = torch.randn(CLUSTERS, case.dim, generator=generator)
    for tokens in features:
        cluster = torch.randint(CLUSTERS, (len(tokens),), generator=generator)
        length = torch.randn(len(tokens), 1, generator=generator).mul_(0.3).exp_()
        noise = torch.randn(tokens.shape, generator=generator)
        torch.mul(noise.mul_(NOISE).add_(centres[cluster]), length, out=tokens)
        centres += DRIFT * torch.randn(centres.shape, generator=generator)
    return features.flatten(0, 1)
