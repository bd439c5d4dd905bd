"""No test here starts a worker or asks the network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bad_input import harness


@pytest.fixture(autouse=True)
def _no_workers() -> Iterator[None]:
    with harness.no_workers():
        yield
