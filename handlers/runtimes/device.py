"""Arrays that stay on a GPU between stages."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from handlers.arrays import BoolArray


class DeviceArray:
    """A PyTorch tensor that stays on its device until ``np.asarray`` copies it to the host."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, rows: Any) -> "DeviceArray":
        return DeviceArray(self.tensor[rows])

    def followed_by(self, others: Sequence["DeviceArray"]) -> "DeviceArray":
        """The rows of this array, then those of ``others``."""
        import torch

        return DeviceArray(torch.cat([self.tensor, *(other.tensor for other in others)]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self.tensor.cpu().numpy(), dtype)

    def finite(self) -> BoolArray:
        """(rows,): which rows have neither NaN nor infinity. Computed on the device."""
        return self.tensor.isfinite().flatten(1).all(1).cpu().numpy()
