"""What the kernels are compared with: makers of ``(x -> y)`` callables from a full-precision weight, by name.

A peer that is not installed, or does not serve this GPU, is left out, and a line says why (:func:`available`). The calls
were read from the packages' code at the versions named in NOTES.md.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyquant.formats.spec import QuantSpec
from pyquant.nn.linear import QLinear

Maker = Callable[[Tensor, int], Callable[[Tensor], Tensor]]

# A 4-bit result is this far from the product with the full weight: round to nearest over 128 normal numbers is off by a
# tenth, NF4 and FP4 over 64 by less or a little more. A peer that is called wrongly is off by about 1.4.
LOOKS_RIGHT = 0.25
# Of a product of the weight in 4 bits with 8-bit activations: a step of int8 is 1/127 of the largest of a token's normal
# numbers, an error of 0.01; 3 bits of mantissa give 0.025. A weight off by its 4 bits would be off by 0.1.
LOOKS_RIGHT_A8 = {"int8": 0.02, "e4m3": 0.05}


def cublas(w: Tensor, group: int) -> Callable[[Tensor], Tensor]:
    """torch's 16-bit linear, i.e. cuBLAS."""
    return lambda x: torch.nn.functional.linear(x, w)


def pyquant(w: Tensor, group: int) -> Callable[[Tensor], Tensor]:
    """QLinear, symmetric; whatever backend serves it."""
    n, k = w.shape
    linear = torch.nn.Linear(k, n, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(w, requires_grad=False)
    return QLinear.from_linear(linear, QuantSpec(4, group)).requires_grad_(False)


def codes_of(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 ``[N, K]`` with zero 8 and scales ``[N, K/G]`` in w's dtype: round to nearest, symmetric."""
    parts = w.float().unflatten(1, (-1, group))
    scale = (parts.abs().amax(2) / 7).to(w.dtype)
    codes = (parts / scale.float()[..., None]).round().clamp(-8, 7) + 8
    return codes.to(torch.uint8).flatten(1), scale


def tinygemm(w: Tensor, group: int) -> Callable[[Tensor], Tensor]:
    """torch's own int4 kernel, which torchao's int4 weights run on older GPUs too (bf16): w = (code - 8) * s + z."""
    if w.dtype != torch.bfloat16 or group < 32:
        raise NotImplementedError("tinygemm takes bf16 and groups of 32 and more")
    codes, scale = codes_of(w, group)
    packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    scales = torch.stack([scale.T, torch.zeros_like(scale.T)], dim=2).contiguous()  # [K/G, N, 2]
    return lambda x: torch._weight_int4pack_mm(x, packed, group, scales)


def _bitsandbytes(kind: str) -> Maker:
    def maker(w: Tensor, group: int) -> Callable[[Tensor], Tensor]:
        import bitsandbytes as bnb

        packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type=kind)  # its default block
        return lambda x: bnb.matmul_4bit(x, packed, quant_state=state)

    maker.__doc__ = f"bitsandbytes' {kind} in blocks of 64, scales in fp32."
    return maker


@functools.cache
def _gemlite() -> type:
    """Its maker of layers, with tiles that it ships: those of an H100 where it has none for this GPU (an H200)."""
    import gemlite
    from gemlite.helper import A16W4_HQQ_INT
    from triton.runtime.autotuner import Autotuner

    gemlite.set_autotune(False)  # what no table holds takes its default tile: tuning takes minutes for each shape
    for module in [m for name, m in sys.modules.items() if name.startswith("gemlite.triton_kernels.")]:
        for kernel in vars(module).values():
            if isinstance(kernel, Autotuner) and len(kernel.configs) == 1:
                kernel.configs = kernel.configs * 2  # Triton asks for the table's tile only where there is a choice
    shipped = Path(gemlite.__file__).parent / "configs"
    name = torch.cuda.get_device_name().lower().replace(" ", "_")
    own = [file for file in shipped.glob("*.json") if file.stem in name]
    gemlite.load_config(str(own[0] if own else shipped / "h100.json"))
    return A16W4_HQQ_INT


def gemlite(w: Tensor, group: int) -> Callable[[Tensor], Tensor]:
    """gemlite's Triton kernels with integer codes, in groups."""
    codes, scale = codes_of(w, group)
    zeros = torch.full_like(scale, 8)
    maker = _gemlite()(device=w.device, dtype=w.dtype)
    return maker.from_weights(codes, scale.reshape(-1, 1), zeros.reshape(-1, 1))


def _humming(w: Tensor, group: int, **inputs: object) -> Any:
    """Its layer with w rounded to int4, before ``transform`` lays it out for the kernels; inputs: of its input's format."""
    from humming.layer import HummingLayer

    n, k = w.shape
    config = {"dtype": "int4", "group_size": group}
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, input_config=inputs, torch_dtype=w.dtype)
    layer = layer.to(w.device)
    layer.load_from_unquantized(w)
    return layer


def _tile(layer: Any, m: int) -> dict[str, Any]:
    """The tile that its heuristics choose for M = m: a call without one compiles those of all ranges of M, 33 for a shape."""
    from humming.tune import get_heuristics_config

    return get_heuristics_config(layer.humming_config, shape_m=m)


def humming(w: Tensor, group: int) -> Callable[[Tensor], Tensor]:
    """humming-kernels; compiles for each shape and tile (NVRTC or nvcc) at the first call."""
    layer = _humming(w, group)
    layer.transform()
    return lambda x: layer(x, tuning_config=_tile(layer, len(x)))


class HummingA8:
    """humming-kernels with int4 weights and 8-bit activations, one scale a token: both halves apart, and in one call.

    Attributes:
        name: of the activations' format, ``"int8"`` or ``"e4m3"``.
    """

    def __init__(self, w: Tensor, group: int, name: str) -> None:
        self.name, self._full = name, (w, group)
        self._layer = _humming(w, group, dtype={"int8": "int8", "e4m3": "float8e4m3"}[name])
        self._layer.transform()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[M, K]`` and the scales of x ``[M, K]``, by its kernel."""
        from humming.forward import may_quant_input

        return may_quant_input(self._layer.humming_config, x)

    def multiply(self, codes: Tensor, scale: Tensor) -> Tensor:
        """``[M, N]`` of what :meth:`quantize` returned."""
        return self._layer(codes, input_scale=scale, tuning_config=_tile(self._layer, len(codes)))

    def __call__(self, x: Tensor) -> Tensor:
        """Both, as its layer does where it is given 16 bits."""
        return self._layer(x, tuning_config=_tile(self._layer, len(x)))

    def rounded(self) -> Tensor:
        """The weight in 4 bits that the layer holds, fp32 ``[N, K]``: rounded once more, the same way."""
        layer = _humming(*self._full)
        return layer.weight_schema.dequant_tensors(dict(layer.state_dict()))


def torchao(w: Tensor, group: int) -> Callable[[Tensor], Tensor]:
    """torchao's int4 weight-only layer, as its ``quantize_`` makes it with the packing that needs no other package."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    n, k = w.shape
    linear = torch.nn.Linear(k, n, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    quantize_(linear, Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d"))
    return linear


OWN = ("pyquant", "cublas-bf16")
LINEAR: dict[str, Maker] = {
    "cublas-bf16": cublas,
    "pyquant": pyquant,
    "tinygemm": tinygemm,
    "bitsandbytes-nf4": _bitsandbytes("nf4"),
    "bitsandbytes-fp4": _bitsandbytes("fp4"),
    "gemlite": gemlite,
    "humming": humming,
    "torchao": torchao,
}
A8: dict[str, Callable[[Tensor, int], HummingA8]] = {
    "humming-int8": functools.partial(HummingA8, name="int8"),
    "humming-e4m3": functools.partial(HummingA8, name="e4m3"),
}
# Who may be handed the first columns of wider rows in a chain; the others get the same x at each call.
TAKES_ROW_STRIDES = ("cublas-bf16", "pyquant")


def available(
    names: list[str] | None = None, say: Callable[[str], None] = print, makers: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The peers that can be made and called here; a small product is tried with each.

    Args:
        names: of these makers; all by default.
        say: told, a line each, who is left out and why.
        makers: :data:`LINEAR`, the default, or :data:`A8`.
    """
    makers = LINEAR if makers is None else makers
    w = torch.randn(256, 1024, device="cuda", dtype=torch.bfloat16) / 32
    x = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)
    found = {}
    for name in makers if names is None else names:
        if name in OWN:
            found[name] = makers[name]
            continue
        if attempt(name, functools.partial(_try, name, makers[name], w, x), say) is not None:
            found[name] = makers[name]
    return found


def _try(name: str, maker: Callable[[Tensor, int], Any], w: Tensor, x: Tensor) -> float:
    return looks_right(name, maker(w, 128), w, x)


def attempt(name: str, work: Callable[[], Any], say: Callable[[str], None] = print) -> Any:
    """What ``work`` returns, or None where a peer's code fails, whatever it is: a line says so, and the others are measured."""
    try:
        return work()
    except Exception as error:
        say(f"{name} is left out: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return None


def versions() -> dict[str, str]:
    """Version of each package of a peer that is installed."""
    found = {}
    for package in ("bitsandbytes", "flashinfer-python", "gemlite", "humming-kernels", "torchao"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def looks_right(name: str, layer: Callable[[Tensor], Tensor], w: Tensor, x: Tensor, most: float = LOOKS_RIGHT) -> float:
    """A peer computes x @ w.T but for its rounding, to 4 bits where nothing else is said. Returns the relative error.

    Raises:
        RuntimeError: it does not; a time of something else says nothing.
    """
    exact = x.float() @ w.float().T
    error = float((layer(x).float() - exact).norm() / exact.norm())
    if not error < most:
        raise RuntimeError(f"{name} is off by {error:.3f} from the product, its bits by at most {most}")
    return error
