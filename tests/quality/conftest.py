"""A small untrained model whose weights are large enough for its input to matter."""

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("cv2")

from vllm_dpp.quality.model import MODEL, make_model  # noqa: E402  (needs the modules above)
from vllm_dpp.quality.packing import tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def model() -> Any:
    spec = replace(MODEL, num_layers=3, initializer_range=0.1)
    made = make_model(tokenizer(), 0, spec).eval()
    with torch.no_grad():  # biases start at 0 and norms at 1, where a lost one goes unnoticed
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(1)
                )
    return made
