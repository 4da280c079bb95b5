"""An image or a video of a prompt."""

from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class MediaItem:
    """One image or video of a prompt.

    Args:
        modality: "image" or "video".
        start: first position of its placeholder, which may hold text between the slices.
        length: number of its own tokens, one per merged patch.
        pixel_values: [patches, patch_dim] float, normalised.
        grid_thw: time slices, patch rows and patch columns, before the spatial merge.
        second_per_grid_t: seconds between two time slices; unused for images.
        entered: which of the merged patches have a token, ascending; None for all of them.
        image_size: height and width of an image, where its features depend on them.
        text: places of the whole placeholder, counted from its start, that hold text.
        target_sizes: patch rows and columns of each of its pictures, where there are several sizes.
    """

    modality: str
    start: int
    length: int
    pixel_values: Tensor
    grid_thw: tuple[int, int, int]
    second_per_grid_t: float = 1.0
    entered: tuple[int, ...] | None = None
    text: frozenset[int] = frozenset()
    image_size: tuple[int, int] | None = None
    target_sizes: tuple[tuple[int, ...], ...] = ()

    @property
    def left(self) -> list[int]:
        """Places of the whole placeholder that are in the prompt."""
        if self.entered is None:
            return list(range(self.length + len(self.text)))
        own = [place for place in range(self._num_whole) if place not in self.text]
        return sorted([*self.text, *(own[index] for index in self.entered)])

    @property
    def end(self) -> int:
        return self.start + self.length + len(self.text)

    @property
    def rows(self) -> list[int]:
        """Positions of its own tokens."""
        return [self.start + i for i, place in enumerate(self.left) if place not in self.text]

    @property
    def _num_whole(self) -> int:
        """Places of the whole placeholder, and more."""
        return max([*self.text, -1]) + 1 + prod(self.grid_thw)
