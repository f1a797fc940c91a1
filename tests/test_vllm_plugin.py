"""The plug-in of vLLM: what arrives at a kernel becomes our tiled order; by vLLM's interface, a stand-in where it is absent."""

from __future__ import annotations

import importlib.util
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
import vllm_stand_in
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.integrations import vllm_plugin
from pyquant.nn import QLinear
from pyquant.nn.linear import multiply

FORMATS = [(4, 128, True), (4, 32, False), (4, -1, True), (3, 32, True), (3, 64, False), (2, 64, True)]


@pytest.fixture
def vllm(monkeypatch):
    """vLLM, or where it is not installed what the plug-in needs of it."""
    if importlib.util.find_spec("vllm") is None:
        vllm_stand_in.install(monkeypatch)


def parts(bits: int, group: int, symmetric: bool, sizes: tuple[int, ...] = (64, 32, 32)) -> list[QLinear]:
    """q, k and v as layers of their own."""
    torch.manual_seed(0)
    return [QLinear.from_linear(nn.Linear(256, n, bias=False), QuantSpec(bits, group, symmetric)) for n in sizes]


def joined(layers: list[QLinear]) -> tuple[Tensor, Tensor, Tensor | None]:
    """What vLLM holds of them: rows one after the other, as the file packs them."""
    held = [layer.portable() for layer in layers]
    zeros = [h["weight_zero_point"] for h in held if "weight_zero_point" in h]
    return (
        torch.cat([h["weight_packed"] for h in held]),
        torch.cat([h["weight_scale"] for h in held]),
        torch.cat(zeros) if zeros else None,
    )


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
def test_joined_rows_are_the_layers(bits, group, symmetric):
    layers, x = parts(bits, group, symmetric), torch.randn(5, 256)
    packed, scale, zeros = joined(layers)
    weight = vllm_plugin.tiled(packed, scale, zeros, 128, 256, bits, group)
    want = torch.cat([layer(x) for layer in layers], -1)
    torch.testing.assert_close(
        multiply(x, weight, None, 128, group), want, rtol=1e-6, atol=1e-6
    )  # fp32, the same codes
    moved = vllm_plugin.tiled(packed.roll(1, 0), scale, zeros, 128, 256, bits, group)
    assert (multiply(x, moved, None, 128, group) - want).abs().max() > 1e-2 * want.abs().max()


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
def test_columns_of_a_process_are_those_of_the_layer(bits, group, symmetric):
    (layer,), x = parts(bits, group, symmetric, (64,)), torch.randn(5, 256)
    packed, scale, zeros = joined([layer])
    total = torch.zeros(5, 64)
    for rank in range(2):  # a row-parallel layer of two GPUs: words and groups of its columns
        words = packed.chunk(2, 1)[rank].contiguous()
        own = scale if group == -1 else scale.chunk(2, 1)[rank].contiguous()
        z = zeros if zeros is None or group == -1 else zeros.chunk(2, 1)[rank].contiguous()
        weight = vllm_plugin.tiled(words, own, z, 64, 128, bits, group)
        total += multiply(x.chunk(2, 1)[rank].contiguous(), weight, None, 64, group)
    torch.testing.assert_close(total, layer(x), rtol=1e-5, atol=1e-5)  # fp32 sums in two parts


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((8, 128, False, 64, 256, torch.bfloat16), "weights of 8 bits"),
        ((4, 16, False, 64, 256, torch.bfloat16), "groups of 16"),
        ((4, 128, False, 64, 256, torch.float32), "torch.float32"),
        ((3, -1, False, 64, 72, torch.float16), "72 input features of 3 bits"),
        ((4, 128, True, 60, 256, torch.float16), "zeros of 60 output features"),
    ],
)
def test_what_the_kernel_cannot_is_said(given, sentence):
    assert sentence in vllm_plugin.why_not(*given)
    assert vllm_plugin.why_not(4, 128, False, 64, 256, torch.bfloat16) == ""
    assert vllm_plugin.why_not(4, 128, False, 64, 192, torch.bfloat16) == QuantSpec(4, 128).misfit(192)


def test_vllm_finds_the_plugin_by_its_entry_point():
    (entry,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "pyquant")
    assert entry.load() is vllm_plugin.register


def test_the_switch_is_checked(monkeypatch):
    monkeypatch.setenv("PYQUANT_VLLM", "second")
    with pytest.raises(ValueError, match="'second' must be one of last, first, off"):
        vllm_plugin.register()


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("how", ["last", "first", "off"])
def test_registering_puts_the_kernel_where_it_is_asked_for(how, monkeypatch):
    from vllm.model_executor.kernels import linear as kernels
    from vllm.platforms import PlatformEnum

    before = list(kernels._POSSIBLE_KERNELS[PlatformEnum.CUDA])
    held = list(before)
    monkeypatch.setitem(kernels._POSSIBLE_KERNELS, PlatformEnum.CUDA, held)
    monkeypatch.setattr(vllm_plugin, "_registered", [])
    monkeypatch.setenv("PYQUANT_VLLM", how)
    for _ in range(2):  # plug-ins may be loaded more than once
        vllm_plugin.register()
    assert len(held) == len(before) + (how != "off")
    if how != "off":
        assert held[-1 if how == "last" else 0].__name__ == "PyQuantLinearKernel"


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMATS)
def test_the_kernel_computes_what_the_layers_compute(bits, group, symmetric):
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.scalar_type import ScalarType

    kind = make_config(MPLinearLayerConfig, ScalarType, bits, group, symmetric)
    kernel_class: Any = vllm_plugin.make_kernel()
    assert kernel_class.can_implement(kind) == (True, None)
    layers, x = parts(bits, group, symmetric), torch.randn(5, 256)
    layer, bias = nn.Module(), torch.randn(128)
    names = ("weight_packed", "weight_scale", "weight_zero_point")
    for name, tensor in zip(names, joined(layers), strict=True):
        if tensor is not None:
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    kernel = kernel_class(kind, *names)
    kernel.process_weights_after_loading(layer)
    want = torch.cat([part(x) for part in layers], -1) + bias
    torch.testing.assert_close(kernel.apply_weights(layer, x, bias), want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("vllm")
def test_the_kernel_refuses_other_types():
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.scalar_type import ScalarType, scalar_types

    kernel_class: Any = vllm_plugin.make_kernel()
    kind = make_config(MPLinearLayerConfig, ScalarType, 4, 128, True)
    for wrong in (scalar_types.int4, scalar_types.uint4, scalar_types.uint8b128, scalar_types.float8_e4m3fn):
        kind.weight_type = wrong
        assert kernel_class.can_implement(kind)[0] is False


def make_config(config: Any, scalar: Any, bits: int, group: int, symmetric: bool) -> Any:
    """Of q, k and v joined, in the way that vLLM's scheme asks for a kernel."""
    kind = scalar.uint(bits, (1 << (bits - 1)) if symmetric else None)
    return config((256, 128), (256, 128), kind, torch.bfloat16, group, not symmetric)
