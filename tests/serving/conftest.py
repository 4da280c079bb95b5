"""An engine process for the tests of a module."""

from collections.abc import Iterator

import pytest

from tests.engines.host import EngineHost, engine_host


@pytest.fixture(scope="module", params=["v1", "v2"])
def host(request: pytest.FixtureRequest) -> Iterator[EngineHost]:
    """An engine process on each of vLLM's two model runners."""
    with engine_host(request.param) as started:
        yield started
