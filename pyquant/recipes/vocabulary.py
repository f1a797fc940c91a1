"""Embeddings, head and layer inputs while a model trains with quantized weights: 16 or 8 bits, trained or frozen.

Qualcomm's public KD-QAT example (quic/aimet, ``llm_qat_kd``) keeps embeddings in 16 bits and rounds the head to 8, one
scale for each row of the vocabulary; activations are 16 bits there. Everything here is a choice of the caller; the
defaults of :func:`pyquant.recipes.kd_qat.prepare` leave all three alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.nn.linear import FakeQuantLinear, QLinear
from pyquant.ops import fake_quant
from pyquant.quantizers import Quantizer, make_quantizer
from pyquant.quantizers.ranges import round_scale

EIGHT = QuantSpec(8, -1)


def fake_quant_tokens(
    x: Tensor, bits: int = 8, group_size: int = -1, clip: float | Tensor = 1.0, range_gradient: bool = False
) -> Tensor:
    """Round groups of each token to signed integers of their own scale, symmetric, straight through::

        q = clamp(round(x / s), -2^(bits-1), 2^(bits-1) - 1),   s = clip max|x| / (2^(bits-1) - 1),   result q s

    Args:
        x: ``[..., K]`` float: a scale for each G values of each row, found anew at every call. Sums and scales in fp32.
        bits: 2..8.
        group_size: G; -1 is one group. Where G does not divide K the last group is shorter.
        clip: factor of the largest magnitude, in (0, 1]; a 0-dim tensor may be learned (with ``range_gradient``).
        range_gradient: let gradients pass through the scale too, to the largest value of the group and to ``clip``.

    Returns:
        shape and dtype of x. Without ``range_gradient`` the gradient passes as it is where nothing was clipped, and is 0
        where something was.
    """
    top = (1 << (bits - 1)) - 1
    k = x.shape[-1]
    wide = x.float()
    if group_size != -1 and group_size < k:
        wide = nn.functional.pad(wide, (0, -k % group_size)).unflatten(-1, (-1, group_size))
    trains = x.requires_grad or (isinstance(clip, Tensor) and clip.requires_grad)
    scale = (wide.abs().amax(-1, keepdim=True) * (clip / top)).clamp_min(1e-12)
    if not range_gradient:
        scale = scale.detach()
    if not trains:
        return _back(torch.round(wide / scale).clamp(-top - 1, top) * scale, x)
    if not range_gradient:
        steps = torch.round(wide.detach() / scale)
        rounded = steps.clamp(-top - 1, top) * scale
        inside = (steps >= -top - 1) & (steps <= top)
        return _back(rounded + torch.where(inside, wide - wide.detach(), 0.0), x)
    v = wide / scale
    v = (v + (torch.round(v) - v).detach()).clamp(-top - 1, top)
    return _back(v * scale, x)


def _back(y: Tensor, like: Tensor) -> Tensor:
    """Groups ``[.., K/G, G]`` to the shape and dtype of ``like``."""
    y = y.flatten(-2)[..., : like.shape[-1]] if y.dim() > like.dim() else y
    return y.to(like.dtype)


def quantize_inputs(model: nn.Module, bits: int = 8) -> list[Any]:
    """Let the quantized linear layers of a model, training or deployed, see inputs of ``bits`` bits.

    Returns:
        the hooks; ``remove()`` of each takes the rounding away again. :func:`pyquant.recipes.kd_qat.convert` drops them: the
        files hold weights only.

    Raises:
        ValueError: bits outside 2..8, or a model without quantized layers.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"activation_bits={bits} must be 16 (off) or between 2 and 8")
    layers = [m for m in model.modules() if isinstance(m, FakeQuantLinear | QLinear)]
    if not layers:
        raise ValueError("the model has no quantized layer whose inputs could be rounded")

    def round_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quant_tokens(args[0], bits), *args[1:])

    return [layer.register_forward_pre_hook(round_inputs) for layer in layers]


class FakeQuantEmbedding(nn.Embedding):
    """An ``nn.Embedding`` that looks up quantized rows: a row has its own scale, so only those looked up are rounded.

    Args:
        embedding: the layer to take over, of the class ``nn.Embedding``; its weight stays the same tensor.
        quantizer: of rows; per channel, with a range that follows the weight.
    """

    def __init__(self, embedding: nn.Embedding, quantizer: Quantizer) -> None:
        nn.Module.__init__(self)
        for name in nn.Embedding.__constants__:
            setattr(self, name, getattr(embedding, name))
        self.weight, self.quantizer = embedding.weight, quantizer
        self.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        return self.quantizer(rows.reshape(-1, self.embedding_dim)).view(rows.shape)


def prepare_vocabulary(
    model: nn.Module,
    embedding_bits: int = 16,
    head_bits: int = 16,
    train_embeddings: bool = True,
    train_head: bool = True,
) -> None:
    """Set what becomes of embeddings and head, in place. Tied ones are one tensor and go together.

    Args:
        model: a causal LM with ``get_input_embeddings`` and ``get_output_embeddings``.
        embedding_bits, head_bits: 16 leaves them; 8 rounds each row in the forward pass, min-max, symmetric.
        train_embeddings, train_head: False stops their gradients.

    Raises:
        ValueError: other widths, a model without the layer, a layer of a class of its own (its forward would be lost), or
            tied layers that are to be treated differently.
    """
    for name, bits in (("embedding_bits", embedding_bits), ("head_bits", head_bits)):
        if bits not in (8, 16):
            raise ValueError(f"{name}={bits} must be 8 or 16")
    if (embedding_bits, head_bits, train_embeddings, train_head) == (16, 16, True, True):
        return
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "get_output_embeddings")):
        raise ValueError(f"{type(model).__name__} does not say which layers are its embeddings and head")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        if (embedding_bits, train_embeddings) != (head_bits, train_head):
            raise ValueError(
                f"embeddings and head are one tensor: embedding_bits={embedding_bits} and head_bits={head_bits}, "
                f"train_embeddings={train_embeddings} and train_head={train_head} must agree"
            )
    elif head is None and (head_bits != 16 or not train_head):
        raise ValueError(f"{type(model).__name__} has no head")
    if embedding_bits == 8:
        if type(embedding) is not nn.Embedding:
            raise ValueError(f"the embeddings are a {type(embedding).__name__}; only nn.Embedding can be rounded")
        _replace(model, embedding, FakeQuantEmbedding(embedding, make_quantizer("ste", embedding.weight, EIGHT)))
    if head_bits == 8:
        if type(head) is not nn.Linear:
            raise ValueError(f"the head is a {type(head).__name__}; only nn.Linear can be rounded to 8 bits")
        _replace(model, head, FakeQuantLinear(head, make_quantizer("ste", head.weight, EIGHT)))
    if not train_embeddings:
        embedding.weight.requires_grad_(False)
    if head is not None and not train_head:
        head.requires_grad_(False)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    names = [name for name, m in model.named_modules(remove_duplicate=False) if m is old]
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new)


@torch.no_grad()
def bake_vocabulary(model: nn.Module, scale_dtype: torch.dtype) -> list[str]:
    """Put plain layers with the rounded values in place of those of :func:`prepare_vocabulary`; returns their names.

    No file format here holds 8 bits: the values of the 8-bit grid are stored in 16 (rounded once more, to
    ``scale_dtype``), and a server that rounds such a head to 8 bits loses next to nothing.
    """
    wrapped = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, FakeQuantEmbedding) or (isinstance(m, FakeQuantLinear) and m.quantizer.spec == EIGHT)
    ]
    baked: set[int] = set()
    for _, m in wrapped:
        weight = m.weight
        if id(weight) not in baked:
            scale, _ = m.quantizer.range(weight)
            weight.copy_(fake_quant(weight, round_scale(scale, scale_dtype), None, -1, 8))
            baked.add(id(weight))
        if isinstance(m, FakeQuantEmbedding):
            plain: nn.Module = nn.Embedding(1, 1, device="meta")
            for attribute in nn.Embedding.__constants__:
                setattr(plain, attribute, getattr(m, attribute))
        else:
            plain = nn.Linear(1, 1, device="meta")
            plain.in_features, plain.out_features, plain.bias = m.in_features, m.out_features, m.bias
        plain.weight = weight
        plain.train(m.training)
        _replace(model, m, plain)
    return [name for name, _ in wrapped]
