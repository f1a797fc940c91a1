"""The distillation loss with its linear heads, forward and backward: time, memory and error, beside other ways.

Part of ``python -m benchmarks.run --family distill``; ``python -m benchmarks.distill --detail`` prints where the time of
one step goes, ``--variants`` times other sizes of chunk and block and the other backend.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.timing import graph_us
from pyquant import reference
from pyquant.ops import _distill_chunks as ours
from pyquant.ops import distill_loss

TOKENS, HIDDEN, VOCABULARY = 2048, 4096, 128256
LENGTHS = [2048, 4096, 8192, 16384, 32768]
KINDS: dict[str, dict[str, float]] = {
    "kl": {"kl": 1.0, "ce": 0.0},
    "jsd": {"kl": 0.0, "jsd": 1.0, "ce": 0.0},
    "kl+ce": {"kl": 0.5, "ce": 0.5},
}
# bf16 rounds each element of grad_x by 1.6e-3 of it (RMS); the gradient of the logits, rounded as well, adds some
GATE = 4e-3
GIB = 1 << 30
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Data:
    """Random hidden states and a head of deviation 0.02, bf16, as for a student whose head is the teacher's: at H = 4096
    logits of deviation 1.28. The hidden states differ, so that logits do by 0.55 and the KL is about 0.15."""

    def __init__(self, tokens: int, hidden: int, vocabulary: int, device: str = "cuda") -> None:
        torch.manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16)

        self.weight = (normal(vocabulary, hidden) * 0.02).requires_grad_()
        self.teacher_weight = self.weight.detach().clone()
        self.x = normal(tokens, hidden).requires_grad_()
        self.teacher_x = self.x.detach() + normal(tokens, hidden) * (0.55 / 0.02 / hidden**0.5)
        self.labels = torch.randint(vocabulary, (tokens,), device=device)

    def step(self, loss: Loss) -> Tensor:
        """Loss of one forward and backward pass into fresh gradients."""
        self.x.grad = self.weight.grad = None
        value = loss(self.x, self.weight, self.teacher_x, self.teacher_weight, self.labels)
        value.backward()
        return value.detach()


# ------------------------------------------------------------------------------------------------ ways to compute it


def pyquant(kind: str, **options: int) -> Loss:
    how = KINDS[kind]
    return lambda x, w, tx, tw, y: distill_loss(x, w, y if how["ce"] else None, tx, tw, **how, **options)[0]


def eager(kind: str) -> Loss:
    """As one writes it: 16-bit logits from the heads, softmax in fp32."""
    how = KINDS[kind]

    def loss(x: Tensor, w: Tensor, tx: Tensor, tw: Tensor, y: Tensor) -> Tensor:
        log_s = torch.log_softmax((x @ w.T).float(), -1)
        with torch.no_grad():
            log_t = torch.log_softmax((tx @ tw.T).float(), -1)
        if kind == "jsd":
            log_m = torch.logaddexp(log_s, log_t) - torch.log(torch.tensor(2.0, device=x.device))
            of_t = (log_t.exp() * (log_t - log_m)).sum(-1)
            return 0.5 * (of_t + (log_s.exp() * (log_s - log_m)).sum(-1)).mean()
        total = how["kl"] * torch.nn.functional.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean()
        return total + how["ce"] * torch.nn.functional.nll_loss(log_s, y) if how["ce"] else total

    return loss


def compiled(kind: str) -> Loss:
    made = torch.compile(eager(kind))

    def loss(*args: Tensor) -> Tensor:
        return made(*args)

    return loss


def liger_fused(kind: str) -> Loss:
    """liger_kernel's LigerFusedLinearJSD; its beta 0 is the forward KL."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta={"kl": 0.0, "jsd": 0.5}[kind])
    return lambda x, w, tx, tw, y: module(x, w, tx, tw, None)


def liger_chunked(kind: str) -> Loss:
    """liger_kernel's chunked_loss.LigerFusedLinearJSDLoss without its cross-entropy, compiled, chunks of 1024."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta={"jsd": 0.5}[kind], compiled=True, chunk_size=1024
    )
    return lambda x, w, tx, tw, y: module(x, w, tx, tw, y)


def liger_kl(kind: str) -> Loss:
    """liger_kernel's LigerFusedLinearKLDivLoss, given the probabilities of an eager teacher."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    module = LigerFusedLinearKLDivLoss()
    {"kl": None}[kind]

    def loss(x: Tensor, w: Tensor, tx: Tensor, tw: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = torch.softmax((tx @ tw.T).float(), -1).to(x.dtype)
        return module(x, w, target)

    return loss


WAYS: dict[str, Callable[[str], Loss]] = {
    "pyquant": pyquant,
    "torch-eager": eager,
    "torch-compile": compiled,
    "liger-fused-jsd": liger_fused,
    "liger-chunked-jsd": liger_chunked,
    "liger-fused-kl": liger_kl,
}


# ------------------------------------------------------------------------------------------------ measurements


def step_ms(run: Callable[[], object], repeats: int = 20) -> float:
    """Median milliseconds between CUDA events around each of many calls in a row, after three of them."""
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def peak_extra(data: Data, loss: Loss) -> int:
    """Bytes above those of the inputs at the worst moment of a step, gradients included."""
    data.step(loss)
    data.x.grad = data.weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    data.step(loss)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def exact(data: Data, kind: str, rows: int = 256) -> tuple[float, Tensor, Tensor]:
    """Loss, grad_x and grad_weight in fp64, a chunk of tokens at a time."""
    how, tokens = KINDS[kind], data.x.shape[0]
    weight = data.weight.detach().double().requires_grad_()
    teacher_weight = data.teacher_weight.double()
    total, grads = 0.0, []
    for begin in range(0, tokens, rows):
        here = slice(begin, min(begin + rows, tokens))
        x = data.x.detach()[here].double().requires_grad_()
        labels = data.labels[here] if how["ce"] else None
        value, _ = reference.distill_loss(x, weight, labels, data.teacher_x[here].double(), teacher_weight, **how)
        value = value * (x.shape[0] / tokens)
        value.backward()
        total += float(value.detach())
        grads.append(x.grad)
    return total, torch.cat(grads), weight.grad


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is right, a part of the rows at a time."""
    parts = zip(got.split(8192), want.split(8192), strict=True)
    return float(sum((a.double() - b).square().sum() for a, b in parts) ** 0.5 / want.norm())


def products_ms(data: Data) -> float:
    """The four matrix products of a step alone, each in one call, 16-bit results."""
    x, w = data.x.detach(), data.weight.detach()
    logits = torch.randn(x.shape[0], w.shape[0], device=x.device, dtype=x.dtype)

    def run() -> None:
        torch.mm(x, w.T, out=logits)
        torch.mm(data.teacher_x, data.teacher_weight.T, out=logits)
        torch.mm(logits, w)
        torch.mm(logits.T, x)

    return step_ms(run)


def distill_rows(ceilings: dict[str, float], tokens: int = TOKENS, lengths: list[int] | None = None) -> list[dict]:
    """Time, memory and error of every way at 2048 tokens, and memory (and time) at more."""
    shape = {"H": HIDDEN, "V": VOCABULARY, "dtype": "bfloat16"}
    rows: list[dict] = []
    data = Data(tokens, HIDDEN, VOCABULARY)
    roof = 1e3 * 8 * tokens * HIDDEN * VOCABULARY / ceilings["bf16_tflops"] / 1e6
    floor = products_ms(data) * 1e3
    rows.append({"op": "four products", "impl": "cublas-bf16", "T": tokens, **shape, "us": round(floor, 1)})
    print(f"four products of T={tokens} H={HIDDEN} V={VOCABULARY}: {floor / 1e3:.2f} ms", flush=True)
    for kind in KINDS:
        value, grad_x, grad_w = exact(data, kind)
        for name, make in WAYS.items():
            try:
                loss = make(kind)
                got = float(data.step(loss))
                errors = relative(data.x.grad, grad_x), relative(data.weight.grad, grad_w)
                if name == "pyquant" and not (max(errors) < GATE and abs(got - value) < 1e-3 * value):
                    raise SystemExit(f"distill {kind} is wrong: {errors}, loss {got} for {value}; nothing is timed")
                time.sleep(1)  # the same clocks for everyone
                us = step_ms(lambda data=data, loss=loss: data.step(loss)) * 1e3
                peak = peak_extra(data, loss)
            except (ImportError, KeyError) as error:
                print(f"{kind} {name}: left out ({error!r})", flush=True)
                continue
            rows.append(
                {
                    "op": f"distill {kind}", "impl": name, "T": tokens, **shape, "us": round(us, 1),
                    "roof_us": round(roof, 1), "baseline": "torch-eager", "peak_extra_gib": round(peak / GIB, 3),
                    "rel_err": errors[0], "rel_err_weight": errors[1], "loss": got, "loss_exact": value,
                }
            )  # fmt: skip
            print(
                f"{kind} {name}: {us / 1e3:.2f} ms, {peak / GIB:.3f} GiB, error of grad_x {errors[0]:.2e}, "
                f"of grad_weight {errors[1]:.2e}, loss {got:.6f} for {value:.6f}", flush=True,
            )  # fmt: skip
            data.x.grad = data.weight.grad = None
            torch.cuda.empty_cache()
        del grad_x, grad_w
    del data
    return rows + memory_rows(lengths or LENGTHS, shape)


def memory_rows(lengths: list[int], shape: dict) -> list[dict]:
    """Peak memory against tokens, the gradients of x and the weight themselves taken off."""
    rows = []
    for name in ("pyquant", "torch-eager", "liger-fused-jsd"):
        for tokens in lengths:
            torch.cuda.empty_cache()
            data = Data(tokens, HIDDEN, VOCABULARY)
            gradients = 2 * (data.x.numel() + data.weight.numel())
            try:
                loss = WAYS[name]("kl")
                peak = peak_extra(data, loss)
                us = step_ms(lambda data=data, loss=loss: data.step(loss), repeats=5) * 1e3
            except (ImportError, torch.OutOfMemoryError) as error:
                print(f"memory of {name} at T={tokens}: left out ({type(error).__name__})", flush=True)
                break
            rows.append(
                {
                    "op": "distill memory", "impl": name, "T": tokens, **shape, "us": round(us, 1),
                    "peak_extra_gib": round(peak / GIB, 3), "beyond_gradients_gib": round((peak - gradients) / GIB, 3),
                }
            )  # fmt: skip
            print(
                f"memory of {name} at T={tokens}: {(peak - gradients) / GIB:.3f} GiB beyond the gradients, "
                f"{us / 1e3:.1f} ms", flush=True,
            )  # fmt: skip
            del data, loss
    return rows


# ------------------------------------------------------------------------------------------------ looking closer


@contextmanager
def setting(**values: int) -> Iterator[None]:
    """Other values of the constants of pyquant.ops.distill."""
    old = {name: getattr(ours, name) for name in values}
    for name, value in values.items():
        setattr(ours, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(ours, name, value)


def variants(data: Data, kind: str = "kl") -> None:
    """Print times and peaks of our step with other sizes, the settled ones before and after."""
    base = ours.BLOCK
    tried: list[tuple[str, dict[str, int], dict[str, int]]] = [("as it is", {}, {})]
    tried += [("logits in one product", {}, {"LOGITS": 1 << 30}), ("BLOCK * 2", {}, {"BLOCK": base * 2})]
    tried += [("chunk=256", {"chunk": 256}, {}), ("chunk=384", {"chunk": 384}, {})]
    tried += [("always scratch, 512 MiB", {}, {"LEND": 0}), ("as it is", {}, {})]
    for what, options, constants in tried:
        with setting(**constants):
            loss = pyquant(kind, **options)
            time.sleep(1)
            ms = step_ms(lambda loss=loss: data.step(loss))
            print(f"{kind} {what}: {ms:.2f} ms, {peak_extra(data, loss) / GIB:.3f} GiB", flush=True)
    loss = pyquant(kind)
    chosen = torch.backends.cuda.preferred_blas_library()
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        time.sleep(1)
        print(f"{kind} products by {library}: {step_ms(lambda: data.step(loss)):.2f} ms", flush=True)
    torch.backends.cuda.preferred_blas_library(chosen)
    data.x.grad = data.weight.grad = None
    captured = graph_us([lambda: data.step(loss)])
    print(f"{kind} in a CUDA graph: {captured / 1e3:.2f} ms; products alone now {products_ms(data):.2f} ms", flush=True)


def detail(data: Data, kind: str = "kl", steps: int = 5) -> None:
    """Print the kernels of a step with their times."""
    from torch.profiler import ProfilerActivity, profile

    loss = pyquant(kind)
    data.step(loss)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            data.step(loss)
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda e: -e.device_time_total)
    for event in events[:16]:
        each = event.device_time_total / event.count
        print(
            f"{event.device_time_total / steps / 1e3:8.3f} ms {event.count / steps:6.1f} x {each:9.1f} us  {event.key[:90]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--detail", action="store_true")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--kind", choices=KINDS, default="kl")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    args = parser.parse_args()
    data = Data(args.tokens, HIDDEN, VOCABULARY)
    print(f"four products alone: {products_ms(data):.2f} ms", flush=True)
    if args.variants:
        variants(data, args.kind)
    if args.detail:
        detail(data, args.kind)


if __name__ == "__main__":
    main()
