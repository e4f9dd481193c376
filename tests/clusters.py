"""Ray clusters of this machine for tests: on loopback, and with a token."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import Any

import pytest

# Ray reads these when it is imported, and hands them on to the processes that it starts.
os.environ |= {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_metrics_report_interval_ms": "500",
}

ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[scale]'")


@contextlib.contextmanager
def cluster(*cores: int) -> Iterator[Any]:
    """A connected cluster with a node for each number of ``cores``; the first is the head."""
    from ray.cluster_utils import Cluster

    made = Cluster()
    try:
        for count in cores:
            made.add_node(num_cpus=count, node_ip_address="127.0.0.1", include_dashboard=False)
        with pytest.MonkeyPatch.context() as patch:  # Ray takes it for this machine's address in the network
            patch.setattr("ray._private.services.resolve_ip_for_localhost", lambda host: host)
            ray.init(made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
