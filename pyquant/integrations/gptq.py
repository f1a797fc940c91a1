"""The GPTQ file format (version 1, symmetric): tensors, config, and a reader that brings it back to QLinear."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from pyquant.formats import int4
from pyquant.formats.spec import QuantSpec
from pyquant.integrations.checkpoint import check_weights, read_config
from pyquant.nn.linear import QLinear


def gptq_config(spec: QuantSpec, quantized: list[str], kept: list[str]) -> dict[str, Any]:
    """``quantization_config`` of a GPTQ checkpoint.

    Args:
        spec: bits and group size.
        quantized, kept: names of the linear layers in low and in high precision. Layers kept beside the output layer
            are said
            twice: in ``dynamic``, which GPTQModel reads, and in ``modules_in_block_to_quantize``, which transformers
                reads.
    """
    config = {
        "quant_method": "gptq",
        "bits": spec.bits,
        "group_size": spec.group_size,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        "meta": {"quantizer": ["pyquant"]},
    }
    if others := [name for name in kept if name != "lm_head"]:
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in others}
        config["modules_in_block_to_quantize"] = [quantized]
    return config


def check_gptq(name: str, layer: QLinear) -> None:
    """Refuse what the format cannot hold.

    Raises:
        ValueError: asymmetric; N or K no multiple of 32; or a scale that fp16 does not hold exactly.
    """
    n, k = layer.out_features, layer.in_features
    if not layer.spec.symmetric:
        raise ValueError(
            "the GPTQ format is written for symmetric weights only; use compressed-tensors for asymmetric ones"
        )
    if n % 32 or k % 32:
        raise ValueError(f"{name} has N={n}, K={k}: GPTQ needs multiples of 32; use compressed-tensors")
    scale = int4.untile_scale(layer.scale, n, k, layer.spec.group_size)
    exact = scale.to(torch.float16).float() == scale.float()
    if not exact.all():
        raise ValueError(
            f"{name}: GPTQ stores scales in float16, which does not hold {int((~exact).sum())} of {exact.numel()} "
            "of them exactly; quantize with scale_dtype=torch.float16, or use compressed-tensors"
        )


def gptq_tensors(layer: QLinear) -> dict[str, Tensor]:
    """``qweight``, ``scales``, ``qzeros`` and ``g_idx`` of a layer that :func:`check_gptq` passed."""
    spec, n, k = layer.spec, layer.out_features, layer.in_features
    state = layer.portable()
    scale = state["weight_scale"]
    zeros = torch.full(
        (scale.shape[1], n), (1 << (spec.bits - 1)) - 1, dtype=torch.uint8, device=scale.device
    )  # zero - 1
    width = k if spec.group_size == -1 else spec.group_size
    return {
        "qweight": state["weight_packed"].T.contiguous(),
        "scales": scale.T.to(torch.float16).contiguous(),
        "qzeros": int4.pack_bits(zeros, spec.bits),
        "g_idx": torch.arange(k, dtype=torch.int32, device=scale.device) // width,
    }


def load_gptq(folder: Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu") -> nn.Module:
    """Load a GPTQ checkpoint such as :func:`gptq_tensors` makes onto QLinear.

    Raises:
        ValueError: not version 1, asymmetric, in activation order, or tensors that do not fit.
    """
    quantization = read_config(folder)["quantization_config"]
    for key, want in (("sym", True), ("desc_act", False), ("checkpoint_format", "gptq")):
        if quantization.get(key) != want:
            raise ValueError(f"{folder}: GPTQ with {key}={quantization.get(key)!r} is not read here, only {want!r}")
    spec = QuantSpec(quantization["bits"], quantization["group_size"])
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    if dtype == "auto":
        dtype = config.dtype
    state: dict[str, Tensor] = {}
    for file in check_weights(folder):
        with safe_open(file, framework="pt") as tensors:
            state.update({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    half = (1 << (spec.bits - 1)) - 1
    for name in [key.removesuffix(".qweight") for key in state if key.endswith(".qweight")]:
        linear = model.get_submodule(name)
        n, k = linear.out_features, linear.in_features
        qzeros, g_idx = state.pop(f"{name}.qzeros"), state.pop(f"{name}.g_idx")
        width = k if spec.group_size == -1 else spec.group_size
        if not torch.equal(g_idx, torch.arange(k, dtype=g_idx.dtype) // width):
            raise ValueError(f"{folder}: {name} is in activation order")
        if (int4.unpack_bits(qzeros, spec.bits, n) != half).any():
            raise ValueError(f"{folder}: {name} has zeros other than {half + 1}")
        state[f"{name}.weight_packed"] = state.pop(f"{name}.qweight").T.contiguous()
        state[f"{name}.weight_scale"] = state.pop(f"{name}.scales").T.contiguous()
        state[f"{name}.weight_shape"] = torch.tensor([n, k])
        parent, _, own = name.rpartition(".")
        layer = QLinear(k, n, linear.bias is not None, spec, dtype=linear.weight.dtype)
        setattr(model.get_submodule(parent), own, layer)
    result = model.load_state_dict(state, strict=False)
    missing = set(result.missing_keys) - set(model.all_tied_weights_keys)
    if missing or result.unexpected_keys:
        raise ValueError(f"{folder}: tensors do not fit the config: {sorted(missing)[:3]} {result.unexpected_keys[:3]}")
    model.tie_weights()
    return model.eval().to(device)
