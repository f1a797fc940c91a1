"""Hadamard rotations of a decoder: the residual stream's folded into weights, the others computed online.

After QuaRot (arXiv 2404.00456). With Q orthogonal, ``x Q`` spreads a channel with outliers over all of them, and RMSNorm
without a weight commutes with Q. So norms' weights are folded into the linear layers that read them, embeddings and the
layers that write the residual stream are multiplied by Q, those that read it by its transpose, and no logit changes. What
goes into o_proj and down_proj is rotated online, with the inverse folded into their weights.

Choices of ours: Q is random signs times one Hadamard matrix of the whole width; o_proj's input is rotated as a whole online,
where QuaRot folds the part inside heads into v_proj; layers are found by what they do, not by name, and the result is
compared with the model before: an architecture that this does not fit is refused.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from pyquant.recipes.awq import _is_offset_norm, find_folds
from pyquant.recipes.blocks import Arguments, block_arguments, call_block, find_blocks

EXACT = 1e-3  # relative difference of logits up to which a rotation in fp32 counts as exact


def factors(n: int) -> tuple[int, int]:
    """``(m, p)`` with ``n = m p`` and p a power of two: m is 1, an order of Paley's construction (12, 20, 28, 44, ..),
    or else the odd part of n."""
    power = n & -n
    odd = n // power
    if odd == 1:
        return 1, n
    for even in (4 << i for i in range(power.bit_length() - 2)):
        if _is_prime(odd * even - 1):
            return odd * even, power // even
    return odd, power


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


def small_orthogonal(m: int) -> Tensor:
    """An orthogonal matrix fp64 ``[m, m]`` with entries as even as there are: Paley's Hadamard matrix where m - 1 is a prime
    of the form 4 k + 3, the discrete Hartley transform (entries at most ``sqrt(2 / m)``) for any other m."""
    q = m - 1
    if m % 4 == 0 and _is_prime(q):
        squares = {i * i % q for i in range(1, q)}
        chi = torch.tensor([0.0 if i == 0 else 1.0 if i in squares else -1.0 for i in range(q)], dtype=torch.float64)
        index = torch.arange(q)
        s = torch.zeros(m, m, dtype=torch.float64)
        s[0, 1:], s[1:, 0] = 1, -1
        s[1:, 1:] = chi[(index[:, None] - index) % q]
        return (s + torch.eye(m, dtype=torch.float64)) / math.sqrt(m)
    angle = 2 * math.pi / m * (torch.arange(m)[:, None] * torch.arange(m) % m).double()
    return (angle.cos() + angle.sin()) / math.sqrt(m)


def hadamard(x: Tensor, inverse: bool = False) -> Tensor:
    """``x R`` with the orthogonal matrix ``R = S (x) H`` of :func:`factors`: S of :func:`small_orthogonal`, H the
    Walsh-Hadamard matrix in natural order, ``n log n`` additions.

    Args:
        x: ``[..., n]``, any n.
        inverse: multiply by ``R^T`` instead.

    Returns:
        shape and dtype of x; sums in x's dtype.
    """
    n = x.shape[-1]
    m, p = factors(n)
    y = x.reshape(-1, m, p)
    width = 1
    while width < p:
        y = y.reshape(-1, p // (2 * width), 2, width)
        y = torch.stack((y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]), 2)
        width *= 2
    y = y.reshape(-1, m, p) * (1 / math.sqrt(p))
    if m > 1:
        small = _small(m, x.dtype, x.device)
        y = torch.einsum("bmp,mn->bnp", y, small.T if inverse else small)
    return y.reshape(x.shape)


@lru_cache
def _small(m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return small_orthogonal(m).to(device, dtype)


def random_rotation(n: int, seed: int) -> Tensor:
    """``Q = diag(random signs) R`` fp64 ``[n, n]`` on the CPU."""
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return hadamard(torch.eye(n, dtype=torch.float64)) * signs[:, None]


class Rotated(nn.Linear):
    """A linear layer whose input is rotated online: ``linear(hadamard(x))``, the inverse being part of its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = hadamard(linear.weight.detach().double()).to(linear.weight.dtype)  # (W R)(R^T x)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(hadamard(x), self.weight, self.bias)


@torch.no_grad()
def rotate(model: nn.Module, tokens: Tensor, seed: int = 0, online: bool = True) -> Tensor:
    """Rotate a decoder in place; its logits stay what they were.

    Args:
        model: in fp32, on its device, with ``get_input_embeddings`` and ``get_output_embeddings``. Tied embeddings are taken
            apart, and ``config.tie_word_embeddings`` becomes False.
        tokens: int64 ``[B, S]``, to compare logits on.
        seed: of the signs.
        online: rotate the inputs of the layers that write the residual stream too; without it the result is a plain
            checkpoint.

    Returns:
        Q, fp64 ``[H, H]``.

    Raises:
        ValueError: the model does not fit (no RMSNorm before each layer that reads the stream, norms after layers, ..),
            with what was found; the model is then not to be used.
    """
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"quarot rotates in fp32, the model is in {dtype}: rotated weights would be rounded once more")
    _, blocks = find_blocks(model)
    tokens = tokens.to(next(model.parameters()).device)
    before = _logits(model, tokens)
    states, arguments = block_arguments(model, blocks, tokens)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    width = embedding.weight.shape[1]
    q = random_rotation(width, seed).to(embedding.weight.device)
    inside = {id(m) for block in blocks for m in block.modules()}
    last = [m for m in model.modules() if _is_norm(m, width) and id(m) not in inside]
    if len(last) != 1:
        raise ValueError(f"quarot needs one norm between blocks and head, {type(model).__name__} has {len(last)}")
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    _fold_norm(last[0], [head])
    _multiply(head, q, reads=True)
    embedding.weight.data.copy_((embedding.weight.double() @ q).to(embedding.weight.dtype))
    for index, block in enumerate(blocks):
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        folds = find_folds(block, linears, _Probe(block, states, arguments[index]))
        states = call_block(block, states, arguments[index])
        readers: list[str] = []
        for producer, consumers in folds.items():
            module = block.get_submodule(producer)
            if _is_norm(module, width):
                _fold_norm(module, [linears[n] for n in consumers])
                readers += consumers
        for name, linear in linears.items():
            if name in readers:
                _multiply(linear, q, reads=True)
            elif linear.out_features == width:
                _multiply(linear, q, reads=False)
                if online:
                    parent, _, own = name.rpartition(".")
                    setattr(block.get_submodule(parent), own, Rotated(linear))
    after = _logits(model, tokens)
    error = ((after - before).norm() / before.norm()).item()
    if not error < EXACT:
        raise ValueError(
            f"quarot does not fit {type(model).__name__}: rotating changes its logits by {100 * error:.2g} % (a decoder of "
            "RMSNorm before attention and MLP is needed)"
        )
    return q


class _Probe:
    """The output of a block for fixed inputs."""

    def __init__(self, block: nn.Module, states: Tensor, arguments: Arguments) -> None:
        self.block, self.states, self.arguments = block, states, arguments

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return call_block(self.block, self.states, self.arguments)


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).logits.float()


def _is_norm(module: nn.Module, width: int) -> bool:
    own = list(module.parameters(recurse=False))
    return len(own) == 1 and own[0].shape == (width,) and "norm" in type(module).__name__.lower()


def _fold_norm(norm: nn.Module, readers: list[nn.Linear]) -> None:
    offset = 1.0 if _is_offset_norm(norm) else 0.0
    weight = norm.weight.detach().float() + offset
    for linear in readers:
        linear.weight.data.mul_(weight.to(linear.weight.dtype))
    norm.weight.data.fill_(1.0 - offset)


def _multiply(linear: nn.Linear, q: Tensor, reads: bool) -> None:
    w = linear.weight.double()
    linear.weight.data.copy_((w @ q if reads else q.T @ w).to(linear.weight.dtype))
    if not reads and linear.bias is not None:
        linear.bias.data.copy_((linear.bias.double() @ q).to(linear.bias.dtype))
