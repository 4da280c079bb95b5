"""The checkpoints that answer: of the task's architecture and words, and of equal depth."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from vllm_dpp.quality.words import ANSWERS

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model on disk.

    Args:
        folder: as `python -m vllm_dpp.quality.train` writes it.
        num_layers: L.
    """

    folder: Path
    num_layers: int

    @cached_property
    def weights(self) -> str:
        """SHA-256 of the weights, in hexadecimal: what it is known by, wherever it lies."""
        return hashlib.sha256((self.folder / WEIGHTS).read_bytes()).hexdigest()


def read_checkpoints(folders: Sequence[Path]) -> list[Checkpoint]:
    """Returns the checkpoints, whose answers can be pooled.

    Raises:
        ValueError: one cannot answer the task's questions in single tokens, one is given twice,
            or their depths differ.
    """
    checkpoints = [_read_checkpoint(folder) for folder in folders]
    depths = {str(one.folder): one.num_layers for one in checkpoints}
    if len(set(depths.values())) > 1:
        raise ValueError(
            f"--models must have equally many layers, to be pooled; these have {depths}"
        )
    if len({one.weights for one in checkpoints}) < len(checkpoints):
        raise ValueError("--models must differ, to be pooled; two have the same weights")
    return checkpoints


def _read_checkpoint(folder: Path) -> Checkpoint:
    for name in ("config.json", "tokenizer.json", WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"--models: {folder} has no {name}; give a folder 'model' as "
                "`python -m vllm_dpp.quality.train` leaves it"
            )
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"--models: {folder / 'config.json'} is not JSON: {error}") from error
    if config.get("architectures") != [ARCHITECTURE]:
        raise ValueError(
            f"--models: {folder} is a {config.get('architectures')}, no {ARCHITECTURE}"
        )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    unknown = [word for word in ANSWERS if len(tokenizer.encode(word).ids) != 1]
    if unknown:
        raise ValueError(
            f"--models: the tokenizer of {folder} has no token for {unknown[0]!r}; answers are of "
            "one token: give a model that was trained with `python -m vllm_dpp.quality.train`"
        )
    return Checkpoint(folder, int(config["text_config"]["num_hidden_layers"]))
