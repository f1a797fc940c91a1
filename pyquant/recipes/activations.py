"""Hidden states of all calibration windows, on the device, in host memory, or on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

PLACES = ("device", "host", "disk")


class Activations:
    """``[n, S, H]`` hidden states that are read and written in batches of windows.

    Args:
        shape: (n, S, H).
        dtype: of what is stored.
        device: where batches go to.
        place: ``device``, ``host`` (pinned when the device is a GPU) or ``disk`` (a file that is deleted with this object).
        folder: for the file; the system's temporary folder by default.

    Raises:
        ValueError: an unknown place.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        place: str = "device",
        folder: Path | None = None,
    ) -> None:
        if place not in PLACES:
            raise ValueError(f"activations={place!r} must be one of {', '.join(PLACES)}")
        self.device, self.place = device, place
        self._file = None
        if place == "disk":
            self._file = tempfile.NamedTemporaryFile(dir=folder, suffix=".activations")  # noqa: SIM115 (lives as long)
            count = shape[0] * shape[1] * shape[2]
            self.data = torch.from_file(self._file.name, shared=True, size=count, dtype=dtype).view(shape)
        else:
            pin = place == "host" and device.type == "cuda"
            self.data = torch.empty(shape, dtype=dtype, device=device if place == "device" else "cpu", pin_memory=pin)

    def __len__(self) -> int:
        return self.data.shape[0]

    def like(self) -> Activations:
        """Empty ones of the same kind."""
        folder = None if self._file is None else Path(self._file.name).parent
        n, s, h = self.data.shape
        return Activations((n, s, h), self.data.dtype, self.device, self.place, folder)

    def copy(self) -> Activations:
        """The same values in storage of their own."""
        other = self.like()
        other.data.copy_(self.data)
        return other

    def rows(self, begin: int, count: int) -> Tensor:
        """Windows begin .. begin+count-1 on the device."""
        return self.data[begin : begin + count].to(self.device, non_blocking=True)

    def write(self, begin: int, rows: Tensor) -> None:
        """Store windows from begin on."""
        self.data[begin : begin + len(rows)].copy_(rows)

    def gather(self, index: Tensor, out: Tensor) -> None:
        """Windows ``index`` (int64 ``[B]``, on the data's own device) into ``out [B, S, H]``, no synchronisation."""
        if self.place == "device":
            torch.index_select(self.data, 0, index, out=out)
        else:
            out.copy_(self.data.index_select(0, index))

    def index_device(self) -> torch.device:
        """Where the index of :meth:`gather` has to be."""
        return self.data.device
