"""GPTQ: round one column at a time and let the columns not yet rounded make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022. Per linear layer
with inputs x and weight W ``[N, K]``, the error ``|(W - W_hat) x|^2`` is a quadratic form with ``H = 2 mean(x x^T)``.
With U the upper Cholesky factor of the inverse of H, column i is rounded and its error, over U[i, i], is taken off the
columns after it in proportion to U[i, i+1:].

Settings of ours: the inputs of a block are those that the already quantized blocks before it produce; ranges come from
the weight as it was before any column moved ("static groups"), so that a group's columns can be visited in any order and
the file needs no group index; with ``act_order`` columns with the largest diag(H) come first; H is fp32 and its damping is
raised tenfold until the factorization succeeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pyquant import reference
from pyquant.formats import int4
from pyquant.formats.spec import QuantSpec
from pyquant.nn.linear import QLinear
from pyquant.nn.swap import SwapReport, swap
from pyquant.quantizers.ranges import find_range
from pyquant.recipes.blocks import BlockCall, find_blocks, first_calls, run_block, watch_inputs
from pyquant.recipes.rtn import check_deployable

COLUMNS = 128  # columns rounded between two updates of the rest of the matrix


class Hessian:
    """``2 mean(x x^T)`` over the tokens seen, fp32 ``[K, K]``."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.sum = torch.zeros(k, k, device=device)
        self.tokens = 0

    def see(self, x: Tensor) -> None:
        """Add the tokens of x ``[..., K]``."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]

    def value(self) -> Tensor:
        """H; zeros before any token."""
        return self.sum * (2.0 / max(1, self.tokens))


def inverse_factor(h: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor U of ``(H + damp * mean(diag H) * I)^-1``, so that ``U^T U`` is the inverse.

    The damping is raised tenfold, up to 1, while H is not positive definite.

    Raises:
        ValueError: when it still is not, or H has NaN or Inf.
    """
    if not torch.isfinite(h).all():
        raise ValueError("the calibration inputs of this layer have NaN or Inf values")
    mean = h.diagonal().mean().clamp_min(1e-12)
    while True:
        damped = h + damp * mean * torch.eye(h.shape[0], device=h.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        if damp >= 1:
            raise ValueError(f"the inputs' second moments are not positive definite, even with damping {damp}")
        damp = min(1.0, damp * 10)


@torch.no_grad()
def gptq_weight(
    w: Tensor,
    h: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    spec: QuantSpec,
    act_order: bool = True,
    damp: float = 0.01,
    moved: Tensor | None = None,
) -> Tensor:
    """The rounded weight w_hat.

    Args:
        w: ``[N, K]``.
        h: Hessian fp32 ``[K, K]``.
        scale, zero: range of each group, ``[N, ceil(K/G)]``; zero is None when symmetric.
        spec: bits, group size, symmetry.
        act_order: visit the columns with the largest inputs first.
        damp: share of the mean of diag(H) that is added to it.
        moved: fp32 ``[N, K]``, filled with each column as it was when it was rounded: rounding it to nearest gives w_hat.

    Returns:
        w_hat fp32 ``[N, K]``, every value on the grid of its group.

    Raises:
        ValueError: H cannot be factored.
    """
    n, k = w.shape
    w, h = w.float().clone(), h.clone()
    dead = h.diagonal() == 0  # inputs that were never anything but 0: their weights do not matter
    h[dead, dead] = 1
    w[:, dead] = 0
    order = torch.argsort(h.diagonal(), descending=True) if act_order else torch.arange(k, device=w.device)
    scales = int4.expand_groups(scale.float(), k, spec.group_size)[:, order]
    zeros = None if zero is None else int4.expand_groups(zero.float(), k, spec.group_size)[:, order]
    w = w[:, order]
    upper = inverse_factor(h[order][:, order], damp)
    w_hat = torch.empty_like(w)
    for begin in range(0, k, COLUMNS):
        end = min(begin + COLUMNS, k)
        errors = torch.empty(n, end - begin, device=w.device)
        part = slice(begin, end)
        z = None if zeros is None else zeros[:, part]
        columns(w[:, part], w_hat[:, part], errors, scales[:, part], z, upper[part, part], spec.bits)
        w[:, end:] -= errors @ upper[begin:end, end:]
    out = torch.empty_like(w_hat)
    out[:, order] = w_hat
    if moved is not None:
        moved[:, order] = w  # a column is not touched after it was rounded
    return out


def _columns(
    w: Tensor, w_hat: Tensor, errors: Tensor, scales: Tensor, zeros: Tensor | None, upper: Tensor, bits: int
) -> None:
    """Round the columns of w ``[N, C]`` one by one into w_hat, moving those to the right; errors over diag(U)."""
    for i in range(w.shape[1]):
        column = w[:, i : i + 1]
        z = None if zeros is None else zeros[:, i : i + 1]
        w_hat[:, i : i + 1] = reference.fake_quant(column, scales[:, i : i + 1], z, -1, bits)
        error = (column - w_hat[:, i : i + 1]) / upper[i, i]
        errors[:, i] = error[:, 0]
        w[:, i + 1 :] -= error * upper[i, i + 1 :]


class _Captured:
    """:func:`_columns` as one CUDA graph for a shape: a hundred columns are a thousand launches, one replay here."""

    def __init__(self, n: int, count: int, zero: bool, bits: int, device: torch.device) -> None:
        def make(*shape: int) -> Tensor:
            return torch.ones(*shape, device=device)

        self.tensors = [make(n, count), make(n, count), make(n, count), make(n, count)]
        self.zeros = make(n, count) if zero else None
        self.upper = torch.eye(count, device=device)

        def work() -> None:
            w, w_hat, errors, scales = self.tensors
            _columns(w, w_hat, errors, scales, self.zeros, self.upper, bits)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            work()

    def __call__(
        self, w: Tensor, w_hat: Tensor, errors: Tensor, scales: Tensor, zeros: Tensor | None, upper: Tensor
    ) -> None:
        mine = self.tensors
        mine[0].copy_(w)
        mine[3].copy_(scales)
        self.upper.copy_(upper)
        if self.zeros is not None and zeros is not None:
            self.zeros.copy_(zeros)
        self.graph.replay()
        w.copy_(mine[0])
        w_hat.copy_(mine[1])
        errors.copy_(mine[2])


_GRAPHS: dict[tuple[int, int, bool, int, torch.device], _Captured] = {}
_GRAPH_BYTES = 1 << 26  # larger matrices keep the GPU busy without a graph


def columns(
    w: Tensor, w_hat: Tensor, errors: Tensor, scales: Tensor, zeros: Tensor | None, upper: Tensor, bits: int
) -> None:
    """:func:`_columns`, on a GPU replayed from a graph."""
    if w.device.type != "cuda" or w.numel() * 4 > _GRAPH_BYTES:
        return _columns(w, w_hat, errors, scales, zeros, upper, bits)
    key = (w.shape[0], w.shape[1], zeros is not None, bits, w.device)
    if key not in _GRAPHS:
        _GRAPHS[key] = _Captured(w.shape[0], w.shape[1], zeros is not None, bits, w.device)
    _GRAPHS[key](w, w_hat, errors, scales, zeros, upper)


def gptq(
    model: nn.Module,
    batches: Iterable[Tensor],
    spec: QuantSpec | None = None,
    rule: str = "mse",
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = ("lm_head",),
    scale_dtype: torch.dtype = torch.bfloat16,
    act_order: bool = True,
    damp: float = 0.01,
    skip_experts: bool = False,
    on_layer: Callable[[str], None] | None = None,
) -> SwapReport:
    """Replace the linear layers of a decoder's blocks by :class:`~pyquant.nn.QLinear`, in place, block by block.

    Args:
        model: a decoder called as ``model(tokens)``; weights ``[N, K]`` bf16, fp16 or fp32.
        batches: calibration tokens, int64 ``[B, S]`` each.
        spec, rule, include, exclude, scale_dtype, skip_experts, on_layer: as :func:`pyquant.recipes.rtn.rtn`.
        act_order, damp: as :func:`gptq_weight`.

    Returns:
        which layers were changed, which were left and why. Linear layers outside the blocks are left.

    Raises:
        ValueError: as rtn; a model without blocks, no batches, or inputs with NaN (the layer is named).
    """
    spec = spec or QuantSpec()
    check_deployable(spec)
    root, blocks = find_blocks(model)
    chosen = set(
        swap(model, spec, lambda _, linear: linear, include, exclude, skip_experts).changed
    )  # all checks, no change
    training = model.training
    model.eval()
    calls = first_calls(model, blocks, batches)
    found: dict[str, nn.Module] = {}
    for index, block in enumerate(blocks):
        prefix = f"{root}.{index}." if root else f"{index}."
        layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and prefix + n in chosen}
        hessians = {n: Hessian(m.in_features, m.weight.device) for n, m in layers.items()}

        def see(name: str, x: Tensor, hessians: dict[str, Hessian] = hessians) -> None:
            hessians[name].see(x)

        with watch_inputs(layers, see):
            for call in calls:
                run_block(block, call)
        for name, layer in layers.items():
            if on_layer is not None:
                on_layer(prefix + name)
            try:
                found[prefix + name] = _quantize(layer, hessians.pop(name), spec, rule, scale_dtype, act_order, damp)
            except ValueError as error:
                raise ValueError(f"{prefix}{name}: {error}") from error
            layer.weight.data.copy_(found[prefix + name].dequantize(layer.weight.dtype))
        calls = [BlockCall(run_block(block, call), call.args, call.kwargs) for call in calls]
    outside = sorted(chosen - set(found))
    report = swap(model, spec, lambda name, _: found[name], list(found), exclude, skip_experts)
    report.kept |= dict.fromkeys(outside, "outside the decoder's blocks")
    model.train(training)
    return report


def _quantize(
    layer: nn.Linear,
    hessian: Hessian,
    spec: QuantSpec,
    rule: str,
    scale_dtype: torch.dtype,
    act_order: bool,
    damp: float,
) -> QLinear:
    scale, zero = find_range(layer.weight, spec, rule, scale_dtype)
    w_hat = gptq_weight(layer.weight, hessian.value(), scale, zero, spec, act_order, damp)
    rounded = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    rounded.weight, rounded.bias = nn.Parameter(w_hat, requires_grad=False), layer.bias
    return QLinear.from_range(rounded, spec, scale, zero).to(layer.weight.dtype)
