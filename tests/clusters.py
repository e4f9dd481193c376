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
    # On a busy machine the defaults, 5 and 10 s, end a proxy that is still starting.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "300",
}

ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[scale]'")


@contextlib.contextmanager
def cluster(*cores: int) -> Iterator[Any]:
    """A connected cluster with a node for each number of ``cores``; the first is the head."""
    from ray.cluster_utils import Cluster

    made = Cluster()
    try:
        with _within_limits(), pytest.MonkeyPatch.context() as patch:
            for count in cores:
                made.add_node(num_cpus=count, node_ip_address="127.0.0.1", include_dashboard=False)
            # Ray takes 127.0.0.1 for this machine's address in the network.
            patch.setattr("ray._private.services.resolve_ip_for_localhost", lambda host: host)
            ray.init(made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@contextlib.contextmanager
def serving(application: Any, name: str, port: int) -> Iterator[None]:
    """``application`` of Ray Serve at ``port`` of the connected cluster's head."""
    from ray import serve

    try:
        with _within_limits(), pytest.MonkeyPatch.context() as patch:
            for module in ("api", "client"):
                patch.setattr(f"ray.serve._private.{module}.HTTP_PROXY_TIMEOUT", 600)
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            serve.run(application, name=name, route_prefix="/")
        yield
    finally:
        serve.shutdown()


@contextlib.contextmanager
def _within_limits() -> Iterator[None]:
    """Skips where Ray's processes do not start within limits of its own, 30 s and more, which cannot all be raised."""
    try:
        yield
    except (TimeoutError, ray.exceptions.GetTimeoutError) as error:
        pytest.skip(f"this machine is too busy for Ray to start: {error}")
    except Exception as error:
        if "imed out" not in str(error):
            raise
        pytest.skip(f"this machine is too busy for Ray to start: {error}")
