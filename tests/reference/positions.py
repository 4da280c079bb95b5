"""Three-axis positions (time, height, width) of every token, by the engine's rule."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .media import MediaItem


def mrope_positions(
    num_tokens: int,
    media: Sequence[MediaItem],
    *,
    tokens_per_second: float,
    spatial_merge_size: int,
) -> Tensor:
    """Positions [3, num_tokens] int64 of a sequence of text tokens and media items.

    Text advances by one on all axes. A media item spans its grid, and the token after it stands one
    past the largest position used so far on any axis. (transformers advances by the spatial extent
    alone, so a long video overlaps the text behind it there; the two agree on images.)
    """
    positions = torch.empty(3, num_tokens, dtype=torch.int64)
    token = next_position = 0
    for item in sorted(media, key=lambda item: item.start):
        positions[:, token : item.start] = next_position + torch.arange(item.start - token)
        next_position += item.start - token
        grid = _grid(item, tokens_per_second, spatial_merge_size)
        positions[:, item.start : item.end] = next_position + _entered(grid, item)
        next_position += int(grid.max()) + 1
        token = item.end
    positions[:, token:] = next_position + torch.arange(num_tokens - token)
    return positions


def mrope_positions_by_slice(
    num_tokens: int, media: Sequence[MediaItem], *, spatial_merge_size: int
) -> Tensor:
    """The same where each slice is a picture of its own, and text tells its time.

    A slice advances by its height or width, whichever is more. transformers has the same rule.
    """
    positions = torch.empty(3, num_tokens, dtype=torch.int64)
    token = next_position = 0
    for item in sorted(media, key=lambda item: item.start):
        positions[:, token : item.start] = next_position + torch.arange(item.start - token)
        next_position += item.start - token
        whole, span = _by_slice(item, spatial_merge_size)
        positions[:, item.start : item.end] = next_position + whole[:, item.left]
        next_position += span
        token = item.end
    positions[:, token:] = next_position + torch.arange(num_tokens - token)
    return positions


def _by_slice(item: MediaItem, spatial_merge_size: int) -> tuple[Tensor, int]:
    """Positions [3, places] of the whole placeholder of an item, and how far it reaches."""
    slices, *sizes = item.grid_thw
    rows, columns = (size // spatial_merge_size for size in sizes)
    found, place, at = [], 0, 0
    for _ in range(slices):
        while place in item.text:
            found.append((at, at, at))
            place, at = place + 1, at + 1
        found += [(at, at + row, at + column) for row in range(rows) for column in range(columns)]
        place, at = place + rows * columns, at + max(rows, columns)
    while place in item.text:
        found.append((at, at, at))
        place, at = place + 1, at + 1
    return torch.tensor(found).T, at


def _entered(grid: Tensor, item: MediaItem) -> Tensor:
    return grid if item.entered is None else grid[:, list(item.entered)]


def _grid(item: MediaItem, tokens_per_second: float, spatial_merge_size: int) -> Tensor:
    """Positions [3, patches] within one item: time slowest, width fastest."""
    slices, patch_rows, patch_columns = item.grid_thw
    step = item.second_per_grid_t * tokens_per_second
    return torch.cartesian_prod(
        torch.tensor([int(index * step) for index in range(slices)]),
        torch.arange(patch_rows // spatial_merge_size),
        torch.arange(patch_columns // spatial_merge_size),
    ).T
