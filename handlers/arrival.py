"""How long a request was queued, by the proxy's header ``X-Request-Start: t=SECONDS.MILLISECONDS``.

TorchServe does not tell its workers how long a request was in its queue. deploy/nginx.conf sets this header, like some
other proxies, and overwrites one sent by a client.
"""

import re
import time
from collections.abc import Mapping
from typing import Any

HEADER = "x-request-start"

_LONGEST = 3600.0  # a longer time is not credible, or the clock has jumped
_SECONDS = re.compile(r"t=(\d{1,12}(?:\.\d{1,6})?)")


def queue_seconds(headers: Mapping[str, Any]) -> float | None:
    """Seconds since the request arrived at the proxy; None without the header, or if its time is not credible.

    Args:
        headers: HTTP headers, in any case.
    """
    value = next((value for name, value in headers.items() if name.lower() == HEADER), None)
    match = _SECONDS.fullmatch(value) if isinstance(value, str) else None
    wait = time.time() - float(match[1]) if match else _LONGEST
    return max(wait, 0.0) if -1 < wait < _LONGEST else None
