"""The vertical parts of BiSup as modules: what is trained, and how it becomes a plain rounded layer without a trace.

Our reading of arXiv 2405.15346, of which only the abstract and short accounts were at hand::

    W'   = W diag(s) / t + (alpha / sqrt(r)) B A        s: smoothing of the inputs, t: of the outputs that another layer reads
    What = Qw(W'),  scale = sigmoid(gamma) max|W'| / (2^(bits-1) - 1)     gamma: one for each group ("fine-grained clipping")
    y    = Qx(x / s; clip = sigmoid(c)) What^T          c: one for all layers that read the same tensor

x / s costs nothing because s is folded into what produces x: a norm's weight, or the rows of a linear layer (t above). The
low-rank term is merged before rounding and costs nothing either. Training computes with the folded norm and the merged
weight themselves, so the finished layer is the trained one bit by bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyquant.formats.spec import QuantSpec
from pyquant.recipes.act_linear import ActLinear, Inputs, best_ratio, round_weight
from pyquant.recipes.awq import _is_offset_norm
from pyquant.reference.weights import wide


class Smoothing(nn.Module):
    """Factors ``s = s0 exp(tau tanh(rho))`` of the channels between a producer and the layers that read it.

    Args:
        producer: norm or linear layer whose outputs are divided by s; its parameters are read, not changed.
        s0: fp32 ``[K]``, where s begins; s stays within ``exp(+-tau)`` of it.
        tau: the soft constraint's width.
        stored: dtype that a norm's weight is stored in: its quotient is rounded to it, and the layers are multiplied by
            exactly what was divided.
    """

    s0: Tensor
    gain: Tensor | None

    def __init__(self, producer: nn.Module, s0: Tensor, tau: float, stored: torch.dtype) -> None:
        super().__init__()
        self.tau, self.stored = tau, stored
        self.register_buffer("s0", wide(s0))
        self.rho = nn.Parameter(torch.zeros_like(self.s0), requires_grad=False)
        self.offset, gain = 0.0, None
        if not isinstance(producer, nn.Linear):
            self.offset = 1.0 if _is_offset_norm(producer) else 0.0
            gain = wide(producer.weight.detach()) + self.offset
        self.register_buffer("gain", gain)

    def wanted(self) -> Tensor:
        """s before a norm's weight is rounded, fp32 ``[K]``."""
        return self.s0 * torch.exp(self.tau * torch.tanh(self.rho))

    def norm_weight(self) -> Tensor:
        """The folded weight of a norm, fp32 ``[K]`` on the grid of the stored dtype; straight through."""
        assert self.gain is not None
        exact = self.gain / self.wanted() - self.offset
        return exact + (exact.detach().to(self.stored).to(exact.dtype) - exact).detach()

    def factors(self) -> Tensor:
        """What the readers' columns are multiplied with, fp32 ``[K]``."""
        s = self.wanted()
        if self.gain is None:
            return s
        new = self.norm_weight().detach() + self.offset
        applied = torch.where(new == 0, s.detach(), self.gain / torch.where(new == 0, 1.0, new))
        return s + (applied - s).detach()


class Trained(nn.Linear):
    """A layer of a block in training.

    Args:
        linear: the layer taken over; its weight is not copied and not trained.
        inputs: what becomes of its inputs.
        spec, scale_dtype: the weight's format.
        ratio: where the range begins, fp32 ``[N, ceil(K/G)]`` of ``max|w|``.
        columns, rows: smoothing of the inputs, and of the outputs.
    """

    ratio0: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        inputs: Inputs,
        spec: QuantSpec,
        scale_dtype: torch.dtype,
        ratio: Tensor,
        columns: Smoothing | None = None,
        rows: Smoothing | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.inputs, self.spec, self.scale_dtype = inputs, spec, scale_dtype
        self.shared: dict[str, Any] = {"columns": columns, "rows": rows}  # owned by the block, not by the layer
        self.register_buffer("ratio0", ratio)
        self.gamma: nn.Parameter | None = None
        self.a: nn.Parameter | None = None
        self.b: nn.Parameter | None = None
        self.gain = 0.0

    def learn_clip(self, most: float) -> None:
        """Make the ratio of each group a sigmoid of a parameter, at most ``most`` in the beginning."""
        self.gamma = nn.Parameter(torch.logit(self.ratio0.clamp(0.05, most)), requires_grad=False)

    def add_low_rank(self, rank: int, gain: float, seed: int) -> None:
        """``gain B A`` with B = 0 and A ~ N(0, 1/rank)."""
        make = torch.Generator().manual_seed(seed)
        rank = min(rank, self.in_features, self.out_features)
        a = torch.randn(rank, self.in_features, generator=make) / math.sqrt(rank)
        self.a = nn.Parameter(a.to(self.weight.device), requires_grad=False)
        self.b = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device), requires_grad=False)
        self.gain = gain

    def smoothed(self) -> Tensor:
        """The weight with smoothing folded in, fp32 ``[N, K]``."""
        w = wide(self.weight)
        if (columns := self.shared["columns"]) is not None:
            w = w * columns.factors()
        if (rows := self.shared["rows"]) is not None:
            w = w / rows.factors()[:, None]
        return w

    def to_round(self) -> Tensor:
        """W', fp32 ``[N, K]``."""
        with torch.autocast(self.weight.device.type, enabled=False):  # the product in fp32 while training too
            w = self.smoothed()
            return w if self.a is None or self.b is None else w + self.gain * (self.b @ self.a)

    def rounded(self) -> tuple[Tensor, Tensor]:
        """w_hat and its scales."""
        ratio = self.ratio0 if self.gamma is None else torch.sigmoid(self.gamma)
        return round_weight(
            self.to_round(), ratio, self.spec, self.scale_dtype, self.inputs.outliers, self.inputs.outlier_bits
        )

    def folded_bias(self) -> Tensor | None:
        """The bias with the outputs' smoothing folded in."""
        rows = self.shared["rows"]
        return self.bias if self.bias is None or rows is None else self.bias / rows.factors().to(self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.rounded()[0].to(self.weight.dtype)
        return nn.functional.linear(self.inputs(x), weight, self.folded_bias())

    @torch.no_grad()
    def find_ratio(self) -> None:
        """Begin with the range of the smallest squared error of the weight as it is now."""
        self.ratio0.copy_(best_ratio(self.to_round(), self.spec, self.inputs.outliers))

    @torch.no_grad()
    def finish(self) -> ActLinear:
        """The layer as it is deployed, computing exactly what this one does."""
        weight, scale = self.rounded()
        bias = self.folded_bias()
        return ActLinear(weight.to(self.weight.dtype).clone(), scale.clone(), bias, self.inputs)


def fold_before(block: nn.Module, smoothings: dict[str, Smoothing]) -> Any:
    """Let every call of a block compute with norms' folded weights; the hook, to be removed by :func:`fold`."""
    norms = [(block.get_submodule(name), s) for name, s in smoothings.items() if s.gain is not None]
    for norm, _ in norms:
        norm.kept_dtype = norm.weight.dtype  # type: ignore[assignment]
        del norm._parameters["weight"]

    def refresh(*_: Any) -> None:
        for norm, smoothing in norms:
            norm.__dict__["weight"] = smoothing.norm_weight().to(norm.kept_dtype)

    refresh()
    return block.register_forward_pre_hook(refresh)


@torch.no_grad()
def fold(block: nn.Module, smoothings: dict[str, Smoothing], hook: Any) -> None:
    """Give norms their folded weights for good."""
    hook.remove()
    for name, smoothing in smoothings.items():
        if smoothing.gain is not None:
            norm = block.get_submodule(name)
            del norm.__dict__["weight"]
            norm.weight = nn.Parameter(smoothing.norm_weight().to(norm.kept_dtype), requires_grad=False)  # type: ignore[arg-type]
            del norm.kept_dtype
