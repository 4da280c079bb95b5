"""An engine process for the tests of a module."""

from collections.abc import Iterator

import pytest

from tests.engines.host import EngineHost, engine_host

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(scope="module", params=["v1", "v2", CUDA])
def host(request: pytest.FixtureRequest) -> Iterator[EngineHost]:
    """An engine process on each of vLLM's two model runners, and on a GPU."""
    with engine_host(request.param) as started:
        yield started
