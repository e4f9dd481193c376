"""Small models run on one thread: threads that wait for each other on a busy machine make them fifty times slower."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Full-size models keep all threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if request.node.get_closest_marker("full") else 1)
    yield
    torch.set_num_threads(threads)
