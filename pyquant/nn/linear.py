"""QLinear, the deployed 4-bit layer, and FakeQuantLinear, the layer it is trained as."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyquant.formats import act8, int4
from pyquant.formats.spec import ActSpec, QuantSpec
from pyquant.ops import (
    dequantize_int4,
    fake_quant,
    linear_w4a8,
    linear_w4a16,
    quantize_activation,
    quantize_int4,
    silu_and_mul,
    silu_and_mul_quantize,
)
from pyquant.quantizers.base import Quantizer, make_quantizer
from pyquant.quantizers.ranges import find_range, round_scale


class QLinear(nn.Module):
    """A linear layer whose weight is 4 bits (or fewer, in the same container) and stays so in memory.

    Drop-in for ``nn.Linear``: ``y = x @ w_hat.T + bias`` for x ``[..., in_features]``. The weight is frozen; gradients flow to
    x and bias.

    ``state_dict`` holds compressed-tensors' ``pack-quantized`` tensors, the form checkpoints have on disk:
    ``weight_packed`` int32 ``[N, ceil(K*bits/32)]``, ``weight_scale`` ``[N, ceil(K/G)]``, ``weight_shape`` int64 ``[2]``, for
    asymmetric weights ``weight_zero_point`` int32 ``[ceil(N*bits/32), ceil(K/G)]``, and ``bias``. In memory they are
    replaced by the tiled order of :mod:`pyquant.formats.int4` as soon as they are loaded.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias.
        spec: bits (2..4), group size, symmetry.
        device: where the empty tensors live.
        dtype: bf16, fp16 (or fp32, which runs in plain torch): of scales and bias, and so of x.
        act: how inputs are quantized to 8 bits or fewer on the way, token by token; None leaves them. Such a layer is for
            inference: no gradient passes through it. May be set later (``layer.act = ActSpec(8)``).

    Raises:
        ValueError: for more than 4 bits, or a K that is no multiple of the group.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        spec: QuantSpec | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        act: ActSpec | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec or QuantSpec()
        self.act = act
        dtype = dtype or torch.get_default_dtype()
        if self.spec.bits > 4:
            raise ValueError(f"QLinear holds 2..4 bits, not {self.spec.bits}")
        if why := self.spec.misfit(in_features):
            raise ValueError(f"QLinear({in_features}, {out_features}): {why}")
        self._register(_portable_like(self, device, dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    # ---------------------------------------------------------------------------------------- making one

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        spec: QuantSpec | None = None,
        rule: str = "minmax",
        scale_dtype: torch.dtype | None = None,
    ) -> QLinear:
        """Quantize an ``nn.Linear`` by rounding to nearest.

        Args:
            linear: the layer; its weight is read, not changed.
            spec: bits, group size, symmetry.
            rule: how the range is found, ``minmax`` or ``mse``.
            scale_dtype: scales are rounded to this dtype (the one they will be stored in); the weight's by default.

        Raises:
            ValueError: for NaN or Inf weights, or a K that is no multiple of the group.
        """
        spec = spec or QuantSpec()
        scale_dtype = scale_dtype or linear.weight.dtype
        scale, zero = find_range(linear.weight, spec, rule, scale_dtype)
        return cls.from_range(linear, spec, scale, zero)

    @classmethod
    def from_range(cls, linear: nn.Linear, spec: QuantSpec, scale: Tensor, zero: Tensor | None) -> QLinear:
        """Quantize an ``nn.Linear`` with given scale and zero, ``[N, ceil(K/G)]``. Scales take the weight's dtype."""
        w = linear.weight.detach()
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, spec, "meta", w.dtype)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        # Codes come from the scale as it is stored: both the search and the loaded file see the same numbers.
        layer._set_tiled(quantize_int4(w, scale.to(w.dtype), zero, spec.group_size, spec.bits), scale.to(w.dtype), zero)
        return layer.train(linear.training)

    @classmethod
    def from_fake_quant(cls, layer: FakeQuantLinear, scale_dtype: torch.dtype | None = None) -> QLinear:
        """Deploy a trained layer: its scales rounded to ``scale_dtype``, its codes found with those scales."""
        scale, zero = layer.range()
        scale = round_scale(scale.detach(), scale_dtype or layer.weight.dtype)
        return cls.from_range(layer, layer.quantizer.spec, scale, None if zero is None else zero.detach())

    # ---------------------------------------------------------------------------------------- using it

    @property
    def prepared(self) -> bool:
        """True once the weight is in tiled order."""
        return "qweight" in self._buffers

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``; under autocast x is cast to the layer's dtype."""
        if not self.prepared:
            raise RuntimeError(
                f"{self} has no weight yet: load a state_dict, or call prepare() after filling its buffers"
            )
        if x.dtype != self.scale.dtype and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.scale.dtype)
        weight = self.qweight, self.scale, self.zero
        return multiply(x, weight, self.bias, self.out_features, self.spec.group_size, self.act)

    def after_silu(self, gate_up: Tensor) -> Tensor:
        """The layer's product of ``silu(gate) * up``, gate_up ``[..., 2 in_features]``; quantized inputs in the same launch."""
        if self.act is None:
            return self(silu_and_mul(gate_up))
        group, k = self.spec.group_size, self.in_features
        made = silu_and_mul_quantize(gate_up, *how_of(self.act, self.zero is None, group))
        return linear_w4a8(
            *made, self.qweight, self.scale, self.zero, self.bias, self.out_features, k, group, self.act.group_size
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """w_hat ``[out_features, in_features]``, in the layer's dtype unless another is given."""
        n, k = self.out_features, self.in_features
        return dequantize_int4(self.qweight, self.scale, self.zero, n, k, self.spec.group_size, dtype)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.spec}" + (
            "" if self.act is None else f" {self.act}"
        )

    # ---------------------------------------------------------------------------------------- state

    def prepare(self) -> QLinear:
        """Turn the portable tensors of a checkpoint into tiled order, in place; nothing happens the second time.

        Raises:
            ValueError: when ``weight_shape``, or the shape of a tensor, contradicts the layer.
        """
        if self.prepared:
            return self
        self._set_portable(dict(self._buffers))
        return self

    def portable(self) -> dict[str, Tensor]:
        """The checkpoint tensors of this layer's weight (see the class), made from the tiled order."""
        n, k, spec = self.out_features, self.in_features, self.spec
        codes = int4.untile_codes(self.qweight, n, k)
        state = {
            "weight_packed": int4.pack_bits(int4.codes_to_fields(codes, spec.bits, spec.symmetric), spec.bits),
            "weight_scale": int4.untile_scale(self.scale, n, k, spec.group_size),
            "weight_shape": torch.tensor([n, k], device=codes.device),
        }
        if self.zero is not None:
            zero = int4.untile_scale(self.zero, n, k, spec.group_size)
            state["weight_zero_point"] = int4.pack_bits(zero.T.contiguous(), spec.bits).T.contiguous()
        return state

    def _set_portable(self, state: dict[str, Tensor]) -> None:
        n, k, spec = self.out_features, self.in_features, self.spec
        if (shape := state["weight_shape"].tolist()) != [n, k]:
            raise ValueError(f"weight_shape {shape} does not match QLinear(in_features={k}, out_features={n})")
        for name, like in _portable_like(self, "meta", state["weight_scale"].dtype).items():
            if state[name].shape != like.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, {self} needs {tuple(like.shape)}")
        fields = int4.unpack_bits(state["weight_packed"], spec.bits, k)
        zero = None
        if not spec.symmetric:
            zero = int4.unpack_bits(state["weight_zero_point"].T, spec.bits, n).T
        self._set_tiled(
            int4.tile_codes(int4.fields_to_codes(fields, spec.bits, spec.symmetric)), state["weight_scale"], zero
        )

    def _set_tiled(self, qweight: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        """Replace whatever is held by a tiled weight; scale and zero are row-major."""
        k, group = self.in_features, self.spec.group_size
        tiled_zero = None if zero is None else int4.tile_scale(zero.to(torch.uint8), k, group, int4.SYMMETRIC_ZERO)
        self._register({"qweight": qweight, "scale": int4.tile_scale(scale, k, group), "zero": tiled_zero})

    def _register(self, buffers: dict[str, Tensor | None]) -> None:
        self._buffers.clear()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.prepared:
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.portable().items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.prepared:  # receive the portable tensors, then tile them
            self._register(_portable_like(self, self.qweight.device, self.scale.dtype))
        here = prefix + "weight_packed" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)
        if here:
            self.prepare()


def multiply(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    n: int,
    group_size: int,
    act: ActSpec | None = None,
) -> Tensor:
    """``x @ w_hat.T + bias`` of a tiled weight (qweight, scale, zero), x quantized as act says, or as it is."""
    if act is None:
        return linear_w4a16(x, *weight, bias, n, group_size)
    made = quantize_activation(x, *how_of(act, weight[2] is None, group_size))
    return linear_w4a8(*made, *weight, bias, n, x.shape[-1], group_size, act.group_size)


def how_of(act: ActSpec, symmetric: bool, group_size: int) -> tuple[int, int, float, torch.dtype, int]:
    """bits, group_size, clip, dtype and sum_size that an op of :mod:`pyquant.ops.act8` takes, for a weight of that kind."""
    dtype = act8.FP8 if act.kind == "float" else torch.int8
    size = act8.sum_size(group_size, act.group_size) if act8.needs_sums(symmetric, dtype) else 0
    return act.bits, act.group_size, act.clip, dtype, size


def _portable_like(layer: QLinear, device: torch.device | str | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Empty portable tensors of a layer."""
    n, k, bits = layer.out_features, layer.in_features, layer.spec.bits
    groups = layer.spec.num_groups(k)
    state = {
        "weight_packed": torch.empty(n, -(-k * bits // 32), dtype=torch.int32, device=device),
        "weight_scale": torch.empty(n, groups, dtype=dtype, device=device),
        "weight_shape": torch.empty(2, dtype=torch.int64, device=device),
    }
    if not layer.spec.symmetric:
        state["weight_zero_point"] = torch.empty(-(-n * bits // 32), groups, dtype=torch.int32, device=device)
    return state


class FakeQuantLinear(nn.Linear):
    """An ``nn.Linear`` that multiplies by the quantized value of its weight, and trains both weight and quantizer.

    Args:
        linear: the layer to take over; weight and bias become this module's own parameters (not copies).
        quantizer: maps the weight to w_hat (see :mod:`pyquant.quantizers`).
    """

    def __init__(self, linear: nn.Linear, quantizer: Quantizer) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.quantizer = quantizer
        self.frozen = False
        self.reused: Any = None  # set inside pyquant.nn.reuse_fake_quant
        self.train(linear.training)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        spec: QuantSpec | None = None,
        quantizer: str = "lsq",
        rule: str = "minmax",
        **settings: Any,
    ) -> FakeQuantLinear:
        """Take over an ``nn.Linear``.

        Args:
            linear: the layer.
            spec: bits, group size, symmetry.
            quantizer: name in :data:`pyquant.quantizers.QUANTIZERS`.
            rule: how the first range is found, ``minmax`` or ``mse``.
            settings: what the quantizer takes beyond these.

        Raises:
            ValueError: for NaN or Inf weights, a K that is no multiple of the group, or an unknown name.
        """
        spec = spec or QuantSpec()
        if why := spec.misfit(linear.in_features):
            raise ValueError(why)
        return cls(linear, make_quantizer(quantizer, linear.weight, spec, rule, **settings))

    def quantized_weight(self) -> Tensor:
        """w_hat ``[N, K]`` in the weight's dtype."""
        if self.frozen:
            return self.weight
        return self.quantizer(self.weight) if self.reused is None else self.reused.weight()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.quantized_weight(), self.bias)

    def range(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero ``[N, ceil(K/G)]`` that the layer multiplies with: the quantizer's, or those it was frozen at."""
        return (self.frozen_scale, self.frozen_zero) if self.frozen else self.quantizer.range(self.weight)

    def freeze(self, scale_dtype: torch.dtype | None = None, snap: bool = True) -> None:
        """Snap the weight to its quantized value and stop training weight and quantizer (the bias too).

        The range is kept in the buffers ``frozen_scale`` and ``frozen_zero`` of the state_dict: a quantizer that follows the
        weight would find another one in the snapped weight.

        Args:
            scale_dtype: dtype the scales will be stored in; they are rounded to it first, so that the frozen value is the one
                that is deployed. None keeps them in fp32.
            snap: False leaves the weight alone and only makes the layer frozen, to load a frozen state_dict into it.
        """
        with torch.no_grad():
            scale, zero = self.range()
            scale = round_scale(scale.detach(), scale_dtype or torch.float32)
            zero = None if zero is None else zero.detach().clone()
            if snap:
                spec = self.quantizer.spec
                self.weight.copy_(fake_quant(self.weight, scale, zero, spec.group_size, spec.bits))
        self.frozen = True
        self.register_buffer("frozen_scale", scale)
        self.register_buffer("frozen_zero", zero)
        self.requires_grad_(False)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", frozen" if self.frozen else "")
