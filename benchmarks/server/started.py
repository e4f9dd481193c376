"""What is started for a ``with`` block and stopped after it."""

from types import TracebackType
from typing import TypeVar

T = TypeVar("T", bound="Started")


class Started:
    """Stopped as well when it cannot be started."""

    def start(self) -> None:
        """Nothing, where there is nothing to start."""

    def stop(self) -> None:
        """End everything that was started, if anything was."""
        raise NotImplementedError

    def __enter__(self: T) -> T:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
