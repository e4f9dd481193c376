import sys

import numpy as np
import pytest

from handlers import limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux alone")
MORE_THAN_EARLIER_TESTS_FREED = 8_000_000_000  # memory that malloc keeps needs no new mapping


def test_what_wants_more_memory_fails_and_then_has_it_again() -> None:
    with limits.memory(50_000_000):
        np.ones(10_000_000, np.uint8)
        with pytest.raises(MemoryError):
            np.empty(MORE_THAN_EARLIER_TESTS_FREED, np.uint8)
    np.ones(100_000_000, np.uint8)


def test_a_limit_within_a_limit_is_no_higher() -> None:
    with limits.memory(50_000_000), limits.memory(500_000_000), pytest.raises(MemoryError):
        np.empty(MORE_THAN_EARLIER_TESTS_FREED, np.uint8)
