"""What a quantized weight looks like: bits, group size, symmetric or not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

GROUP_SIZES = (-1, 32, 64, 128)


@dataclass(frozen=True)
class QuantSpec:
    """How the weights of a linear layer are quantized.

    Args:
        bits: width of a code, 2..4 for deployable weights (up to 8 for fake quantization).
        group_size: input features that share a scale: 32, 64, 128, or -1 for one scale per output row.
        symmetric: True: signed codes ``-2^(b-1) .. 2^(b-1)-1`` around 0. False: codes ``0 .. 2^b-1`` and an integer zero point.

    Raises:
        ValueError: for widths or group sizes that no kernel or file format here holds.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be between 2 and 8")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size={self.group_size} must be one of {GROUP_SIZES} (-1 means per channel)")

    @property
    def qmin(self) -> int:
        """Lowest code: negative when symmetric, 0 otherwise."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Highest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    def num_groups(self, k: int) -> int:
        """Scales per row for K = k."""
        return num_groups(k, self.group_size)

    def misfit(self, k: int) -> str | None:
        """Why K = k cannot be stored with this spec, or None. (The kernels take a ragged last group; files do not.)"""
        if self.group_size > 0 and k % self.group_size:
            return (
                f"K={k} must be a multiple of group_size={self.group_size} (use group_size=-1 for per-channel scales)"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> QuantSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: for an unknown field.
        """
        unknown = sorted(set(fields) - {"bits", "group_size", "symmetric"})
        if unknown:
            raise ValueError(f"unknown quantization field(s) {unknown}; known: bits, group_size, symmetric")
        return cls(**fields)

    def __str__(self) -> str:
        group = "per channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"W{self.bits} {group} {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True)
class ActSpec:
    """How the inputs of a linear layer are quantized, token by token, with scales found as it runs.

    Args:
        bits: width of a code, 2..8 (all are multiplied as 8-bit integers).
        group_size: input features of a token that share a scale: 32, 64, 128, or -1 for one scale a token.
        clip: factor of the largest magnitude, in (0, 1].
        kind: ``int``, or ``float`` for e4m3 (8 bits).

    Raises:
        ValueError: for what no kernel here holds.
    """

    bits: int = 8
    group_size: int = -1
    clip: float = 1.0
    kind: str = "int"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"act_bits={self.bits} must be between 2 and 8 (or 16 for inputs as they are)")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"act_group_size={self.group_size} must be one of {GROUP_SIZES} (-1 means a whole token)")
        if not 0 < self.clip <= 1:
            raise ValueError(f"act_clip={self.clip:g} must be in (0, 1]")
        if self.kind not in ("int", "float") or (self.kind == "float" and self.bits != 8):
            raise ValueError(f"act_kind={self.kind!r} must be 'int', or 'float' with 8 bits (act_bits={self.bits})")

    def __str__(self) -> str:
        group = "a token" if self.group_size == -1 else f"g{self.group_size}"
        clip = "" if self.clip == 1 else f" clip {self.clip:.3g}"
        return f"A{self.bits} {'e4m3 ' if self.kind == 'float' else ''}{group}{clip}"


def num_groups(k: int, group_size: int) -> int:
    """Groups along K; the last may be ragged. ``group_size=-1`` is one group."""
    return 1 if group_size == -1 else -(-k // group_size)
