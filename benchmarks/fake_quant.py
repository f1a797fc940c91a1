"""The rows of ``benchmarks.run --family fake_quant``: every way to train a weight, forward and backward, beside plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import copies_for, graph_us
from pyquant import reference
from pyquant.formats import int4
from pyquant.ops import fake_quant

SHAPES = [(4096, 14336), (8192, 28672)]  # (N, K)
BITS, BETA, TEMPERATURE = 4, 10.0, 4.0
# name -> (rounding, clamp, soft_forward)
MODES = {
    "LSQ": ("ste", "hard", False),
    "soft slope": ("sigmoid-b", "sigmoid", False),
    "soft forward": ("sigmoid-b", "sigmoid", True),
    "soft slope, reading A": ("sigmoid-a", "sigmoid", False),
}
PEERS = ("LSQ", "soft slope", "soft forward")  # the modes that plain torch is timed in


def plain(w: Tensor, scale: Tensor, group: int, mode: tuple[str, str, bool], temperature: Tensor) -> Tensor:
    """The same in plain torch, with torch's own autograd: what a user without our kernels writes (symmetric, 4 bits)."""
    rounding, clamp, soft_forward = mode
    s = scale.unsqueeze(-1)
    v = w.view(w.shape[0], -1, group).float() / s
    low, high = -8, 7
    if clamp == "hard":
        c = v.clamp(low, high)
    else:
        above, below = torch.sigmoid(BETA * (v - low)), torch.sigmoid(BETA * (high - v))
        c = v * above * below + low * (1 - above) + high * (1 - below)
    if rounding == "ste":
        f = c + (c.round() - c).detach()
    else:
        n = c.detach().floor()
        f = n + 0.5 + 0.5 * torch.tanh(0.5 * temperature * (c - n - 0.5)) / torch.tanh(temperature / 4)
        if not soft_forward:
            f = f + (v.round().clamp(low, high) - f).detach()
    return (f * s).view_as(w).to(w.dtype)


def fake_quant_rows(ceilings: dict[str, float], groups: tuple[int, ...] = (128, -1)) -> list[dict]:
    """fake_quant (bf16, 4 bits, symmetric) forward, and forward + backward, against torch eager and torch.compile."""
    rows = []
    temperature = torch.tensor(TEMPERATURE, device="cuda")
    for n, k in SHAPES:
        for group in groups:
            width = k if group == -1 else group
            copies = copies_for(2 * n * k, most=4)
            ws = [(torch.randn(n, k, device="cuda") * 0.02).bfloat16().requires_grad_() for _ in range(copies)]
            scales = [(torch.rand(n, k // width, device="cuda") * 4e-3 + 6e-3).requires_grad_() for _ in range(copies)]
            grad = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
            for name, mode in MODES.items():
                ours = partial(_ours, group=group, mode=mode, temperature=temperature)
                error = _check(ours, ws[0], scales[0], grad, group, mode, temperature)
                made: dict[str, Callable[..., Tensor]] = {"pyquant": ours}
                if name in PEERS and group != -1:
                    made["torch-eager"] = partial(plain, group=group, mode=mode, temperature=temperature)
                    torch._dynamo.reset()  # past a number of compilations it would run eagerly instead
                    made["torch-compile"] = torch.compile(made["torch-eager"], dynamic=False)
                rows += _time(made, name, ws, scales, grad, group, ceilings["read_tbps"], error)
            del ws, scales, grad
    return rows


def _ours(w: Tensor, scale: Tensor, group: int, mode: tuple[str, str, bool], temperature: Tensor) -> Tensor:
    rounding, clamp, soft = mode
    return fake_quant(w, scale, None, group, BITS, 1.0, rounding, clamp, temperature, BETA, soft)


def _check(
    ours: Callable[..., Tensor],
    w: Tensor,
    scale: Tensor,
    grad: Tensor,
    group: int,
    mode: tuple[str, str, bool],
    temperature: Tensor,
) -> float:
    """Relative error of all results on the first rows against the reference in fp64; wrong ones end the benchmark.

    The gate is 2^-8: a bf16 rounding costs 2^-9 in the worst case.
    """
    rows = slice(0, 64)
    leaves = [t[rows].detach().requires_grad_() for t in (w, scale)]
    out = ours(*leaves)
    got = (out.detach(), *torch.autograd.grad(out, leaves, grad[rows]))
    rounding, clamp, soft = mode
    # fp64 of the fp32 quotient's codes: w / scale is rounded to fp32 first, as the op does
    wide_s = leaves[1].detach()
    spread = int4.expand_groups(wide_s, w.shape[1], group)
    wide_w = (leaves[0].detach().float() / spread).double() * spread.double()
    how = (rounding, clamp, temperature, BETA, soft)
    want = (
        reference.fake_quant(wide_w, wide_s.double(), None, group, BITS, 1.0, *how),
        *reference.fake_quant_backward(grad[rows].double(), wide_w, wide_s.double(), None, group, BITS, 1.0, *how)[:2],
    )
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]
    if not max(errors) < 2.0**-8:
        raise SystemExit(f"fake_quant {mode} is wrong at K={w.shape[1]}, group {group}: {errors}; nothing is timed")
    return max(errors)


def _time(
    made: dict[str, Callable[..., Tensor]],
    name: str,
    ws: list[Tensor],
    scales: list[Tensor],
    grad: Tensor,
    group: int,
    read_tbps: float,
    error: float,
) -> list[dict[str, Any]]:
    n, k = grad.shape

    def forward(f, i):
        with torch.no_grad():
            return f(ws[i], scales[i])

    def both(f, i):
        return torch.autograd.grad(f(ws[i], scales[i]), (ws[i], scales[i]), grad)

    rows = []
    for what, call, bytes_each in (("forward", forward, 4), ("forward+backward", both, 10)):
        roof = n * k * bytes_each / read_tbps / 1e6
        times = {}
        for impl, f in made.items():
            for i in range(2):  # torch.compile compiles outside of the capture
                call(f, i % len(ws))
            times[impl] = graph_us([lambda i=i, f=f, call=call: call(f, i) for i in range(len(ws))])
        for impl, us in times.items():
            rows.append(
                {
                    "op": f"fake_quant {what}", "mode": name, "impl": impl, "dtype": "bfloat16", "N": n, "K": k,
                    "group": group, "us": round(us, 1), "roof_us": round(roof, 1), "baseline": "torch-compile",
                    "baseline_us": round(times["torch-compile"], 1) if "torch-compile" in times else None,
                    "rel_err": error if impl == "pyquant" else None,
                }
            )  # fmt: skip
        print(
            f"fake_quant {what} {name} N={n} K={k} group {group}: roof {roof:.0f} "
            + " ".join(f"{impl} {us:.1f}" for impl, us in times.items()),
            flush=True,
        )
    return rows
