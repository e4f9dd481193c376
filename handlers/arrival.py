"""How long a request was queued, where a proxy in front says when it came: ``X-Request-Start: t=SECONDS.MILLISECONDS``.

TorchServe does not tell its workers how long a request stood in its queue. deploy/nginx.conf sets this header, which
other proxies know as well, and overwrites what a client sends under its name.
"""

import re
import time
from collections.abc import Mapping
from typing import Any

HEADER = "x-request-start"

_LONGEST = 3600.0  # what claims more is no time of arrival, or the clock has jumped
_SECONDS = re.compile(r"t=(\d{1,12}(?:\.\d{1,6})?)")


def queue_seconds(headers: Mapping[str, Any]) -> float | None:
    """Seconds since the request came; None where no proxy says, or what it says cannot be.

    Args:
        headers: HTTP headers, in any case.
    """
    said = next((value for name, value in headers.items() if name.lower() == HEADER), None)
    match = _SECONDS.fullmatch(said) if isinstance(said, str) else None
    wait = time.time() - float(match[1]) if match else _LONGEST
    return max(wait, 0.0) if -1 < wait < _LONGEST else None
