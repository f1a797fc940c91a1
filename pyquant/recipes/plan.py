"""What a recipe will need: GPU and host memory at its peak, and time, from the shape of a model alone.

Bytes are counted as the recipes allocate them (as ``torch.cuda.max_memory_allocated`` counts, without what the allocator
keeps in reserve or the CUDA context, about 1 GB beside it); times come from measured rates of an H200
(:mod:`pyquant.recipes.plan_constants`). Each function says what it plans; a step of the peak that is not the largest is not
added. GPUs: kd-qat and soft-qat are sharded (:mod:`pyquant.recipes.sharding`), blockwise and bisup share out their windows,
serving is cut over at most as many GPUs as there are KV heads and repeated over the rest, gptq and rtn run on one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from pyquant.recipes.kd_loss import KDLoss
from pyquant.recipes.kd_settings import KDConfig
from pyquant.recipes.memory import Estimate, estimate
from pyquant.recipes.plan_constants import GIB, value
from pyquant.recipes.settings import Settings
from pyquant.recipes.shapes import Shape

RECIPES = ("rtn", "gptq", "blockwise", "bisup", "kd-qat", "soft-qat", "serve")


@dataclass(frozen=True)
class Work:
    """How much is done.

    Args:
        gpus: processes, one GPU each.
        length: tokens a window.
        batch: windows a step of all GPUs together; sequences at once of ``serve``.
        windows: calibration windows of gptq, blockwise and bisup.
        steps: of training; of each block in blockwise and bisup; new tokens of ``serve``.
        memory: bytes of a GPU, to choose settings that fit.
        kv_bits: of the cache of ``serve``.
    """

    gpus: int = 1
    length: int = 2048
    batch: int = 8
    windows: int = 128
    steps: int = 1000
    memory: float = 141e9
    kv_bits: int = 16


@dataclass(frozen=True)
class Plan:
    """What one recipe needs on one number of GPUs: bytes of each GPU, of each host, seconds, and what was chosen."""

    recipe: str
    gpus: int
    need: Estimate
    seconds: float
    unit: str
    settings: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def device(self) -> float:
        """Bytes of a GPU."""
        return sum(self.need.device.values())

    @property
    def host(self) -> float:
        """Bytes of a host."""
        return sum(self.need.host.values())


def plan(shape: Shape, recipe: str, work: Work) -> Plan:
    """The plan of one recipe.

    Raises:
        ValueError: an unknown recipe, or numbers that cannot be.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    for name in ("gpus", "length", "batch", "windows", "steps"):
        if getattr(work, name) < 1:
            raise ValueError(f"{name}={getattr(work, name)} must be at least 1")
    if recipe in ("kd-qat", "soft-qat", "blockwise", "bisup") and work.batch % work.gpus:
        work = replace(work, batch=work.gpus * max(1, work.batch // work.gpus))
    how = {"rtn": rtn, "gptq": gptq, "blockwise": blockwise, "bisup": bisup, "serve": serve}
    made = how[recipe](shape, work) if recipe in how else kd_qat(shape, work, recipe == "soft-qat")
    notes = list(made.notes)
    if shape.experts and recipe != "serve":
        notes.append("pyquant quantize refuses fused experts today: the numbers say what the size alone would take")
    if made.device > work.memory:
        notes.append(f"does not fit {work.memory / 1e9:.0f} GB")
    return replace(made, notes=notes)


# ------------------------------------------------------------------------------------------------ whole-model training


def activations(shape: Shape) -> float:
    """Bytes that backward keeps of one token in one block, in bf16, the quantized weights aside.

    Two norms keep their input in fp32 and their normed values, projections their inputs (q, k and v share one, gate and up
    too), attention q, k, v, its output and a copy for o_proj, and the MLP its two products, the activation and their product
    for each of the experts that a token takes.
    """
    q, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    mlp = 8 * shape.mlp * (shape.active or 1) + (2 * shape.hidden * shape.active if shape.active else 0)
    return 16 * shape.hidden + 6 * q + 4 * kv + mlp


@dataclass(frozen=True)
class States:
    """Bytes a weight of a student's training: what stays, what a step adds, and temporaries of the optimizer's step."""

    resident: float
    gradients: float
    temporaries: float = 0.0


# (weights, optimizer); "benchmark" is that of benchmarks.qat_large: bf16 moments, no copies.
STATES = {
    ("fp32", "adamw_torch"): States(12, 4, 4),
    ("fp32", "adamw_torch_fused"): States(12, 4),
    ("bf16", "adamw_torch"): States(14, 6, 4),
    ("bf16", "adamw_torch_fused"): States(14, 6),
    ("fp32", "adamw_8bit"): States(6, 4),
    ("bf16", "adamw_8bit"): States(8, 6),
    ("bf16", "benchmark"): States(6, 2),
}


def kd_memory(
    shape: Shape, config: KDConfig, gpus: int, optim: str | None = None, group: int = 128
) -> dict[str, float]:
    """Bytes of each GPU by what needs them, at the peak of a step.

    The peak is one of two moments: the end of the forward pass (activations and quantized weights of all blocks, the head's
    gradient, which the fused loss makes on its way) or the optimizer's step (all gradients); between them one falls as
    the other rises.

    Args:
        config: weights, optim, batch_size (of all GPUs), seq_len, gradient_checkpointing, shard_teacher, keep_gathered.
        optim: overrides ``config.optim``, to plan what only the benchmark does.
    """
    total, q, rest = shape.parameters, shape.quantized, shape.rest
    tokens = config.batch_size // gpus * config.seq_len
    states = STATES[config.weights, optim or config.optim]
    scales = 16 * q / group / gpus
    if gpus > 1:
        states = States(12, 4)  # fp32 shards, their moments and gradients
        gathered = 2 * (total if config.keep_gathered else rest + 2 * shape.block)
        if config.weights == "fp32":
            gathered *= 2
    else:
        gathered = 0
    teacher = 2 * total if not (config.shard_teacher and gpus > 1) else 2 * (rest + q / gpus + 2 * shape.block)
    w_hat = 2 * (shape.block if config.gradient_checkpointing else q)
    kept = tokens * activations(shape)
    kept = kept + tokens * shape.layers * 2 * shape.hidden if config.gradient_checkpointing else kept * shape.layers
    head = shape.vocabulary * shape.hidden * 2  # its gradient is that of the compute dtype
    forward = w_hat + kept + head + (value("head's loss") if tokens >= 4096 else 0.04 * GIB)
    step = total * (states.gradients + states.temporaries) / gpus + scales / 4
    parts = {
        "teacher": teacher,
        "student and optimizer": total * states.resident / gpus + 0.75 * scales,
        "gathered weights": gathered,
    }
    if forward > step:
        parts |= {"quantized weights": w_hat, "activations": kept, "head": forward - w_hat - kept}
    else:
        parts |= {"gradients": step}
    return parts


def kd_step(shape: Shape, work: Work, config: KDConfig, soft: bool, optim: str | None = None) -> float:
    """Seconds of an optimizer step, kernel by kernel as the recipe runs; communication is taken to overlap."""
    tokens = work.batch // work.gpus * work.length
    passes = 6 if soft and not config.loss.kl else 8  # without a teacher its forward falls away
    states = STATES[config.weights, optim or config.optim]
    own = shape.parameters / work.gpus
    optimizer = own * (2 * states.resident + 2 * states.gradients) / value("read bandwidth")
    seconds = passes * tokens * shape.multiplied / value("training rate") + optimizer
    seconds += shape.quantized * value("training of a quantized weight") * (value("soft rounding") if soft else 1)
    seconds *= value("kernel by kernel") * (value("checkpointing") if config.gradient_checkpointing else 1)
    if work.gpus == 1:
        return seconds
    gathers = (1 if config.keep_gathered else 2) + config.shard_teacher
    sent = shape.parameters * (2 * gathers + 4) * (work.gpus - 1) / work.gpus
    return max(seconds, sent / _link(work.gpus))


def _link(gpus: int) -> float:
    return value("between GPUs of a host" if gpus <= value("GPUs of a host") else "between hosts")


def kd_qat(shape: Shape, work: Work, soft: bool = False) -> Plan:
    """The first settings that fit, from the fastest on: checkpointing, a sharded teacher, on one GPU 8-bit moments."""
    base = KDConfig(batch_size=work.batch, seq_len=work.length, weights="bf16", optim="adamw_torch_fused")
    if soft:
        base = replace(base, loss=KDLoss(kl=0, ce=1))
    choices = [base, replace(base, gradient_checkpointing=True)]
    if work.gpus > 1:
        choices = [replace(base, keep_gathered=True), *choices]
        choices += [replace(c, shard_teacher=True) for c in choices[1:]]
    else:
        choices += [replace(c, optim="adamw_8bit") for c in choices]
    needs = [kd_memory(shape, c, work.gpus) for c in choices]
    totals = [sum(n.values()) for n in needs]
    best = next((i for i, t in enumerate(totals) if t <= work.memory), totals.index(min(totals)))
    config = choices[best]
    total, local = shape.parameters, min(work.gpus, int(value("GPUs of a host")))
    # before it is sharded each process has a student of its own
    held = ("checkpoint", 2.0) if work.gpus == 1 else ("students in fp32", 4.0)
    host = {held[0]: held[1] * total * local, "python": value("python, torch and CUDA on the host") * local}
    settings = {"weights": config.weights, "optim": config.optim}
    settings |= {
        name: "true" for name in ("gradient_checkpointing", "shard_teacher", "keep_gathered") if getattr(config, name)
    }
    one = kd_step(shape, work, config, soft)
    disk = total * 26.0
    unit = f"{work.steps} steps of {work.batch} x {work.length} tokens, {one:.2f} s each"
    recipe = "soft-qat" if soft else "kd-qat"
    return Plan(recipe, work.gpus, Estimate(needs[best], host, disk), one * work.steps, unit, settings)


# ------------------------------------------------------------------------------------------------ calibration


def rtn(shape: Shape, work: Work) -> Plan:
    """The whole model on one GPU, each layer replaced in place; the old weights stay for the report of errors."""
    search = 17 * min(1 << 22, shape.largest)  # the search of ranges takes 4 M weights at once, four fp32 copies
    device = {
        "model": 2.0 * shape.parameters,
        "quantized weights": value("weight in 4 bits") * shape.quantized,
        # its errors: the weight, the quantized one and their difference in fp32
        "one layer": max(float(search), 12.0 * shape.largest),
    }
    host = {"checkpoint": 2.0 * shape.parameters, "python": value("python, torch and CUDA on the host")}
    seconds = shape.quantized * 36 * 100 / value("read bandwidth")  # 36 ranges tried, about 100 bytes a weight each
    notes = [] if work.gpus == 1 else ["runs on one GPU"]
    return Plan("rtn", work.gpus, Estimate(device, host), seconds, "without reading and writing files", {}, notes)


def _gptq_seconds(shape: Shape, tokens: float) -> float:
    """Second moments in fp32, the columns one after the other, and two passes of the block."""
    total = 2 * 2 * tokens * shape.used / value("prefill rate")
    for name, n, k in shape.linears:
        experts = shape.repeats(name)
        share = tokens * (shape.active / shape.experts if experts > 1 else 1)
        moments = 2 * share * k * k / value("fp32 rate")
        columns = k * 12 * value("launch") + n * k * k / value("fp32 rate")
        total += experts * (moments + columns + 4 * k**3 / value("fp32 rate"))
    return shape.layers * total


def gptq(shape: Shape, work: Work) -> Plan:
    """The whole model on one GPU, a copy of its linear layers, a block's inputs of all windows, second moments of one block."""
    tokens, widest = work.windows * work.length, max(k for _, _, k in shape.linears)
    moments = 4.0 * sum(k * k * shape.repeats(name) for name, _, k in shape.linears)
    device = {
        "model": 2.0 * shape.parameters,
        "copy of the linear layers": 2.0 * (shape.quantized + shape.vocabulary * shape.hidden),
        "quantized weights": value("weight in 4 bits") * shape.quantized,
        "inputs of a block": 2 * 2.0 * tokens * shape.hidden,
        "second moments of a block": moments,
        "one layer": 5 * 4.0 * widest**2 + 6 * 4.0 * shape.largest,  # factors of its moments, and its weight
    }
    host = {"checkpoint": 2.0 * shape.parameters, "python": value("python, torch and CUDA on the host")}
    notes = [] if work.gpus == 1 else ["runs on one GPU"]
    unit = f"{work.windows} windows of {work.length} tokens"
    return Plan("gptq", work.gpus, Estimate(device, host), _gptq_seconds(shape, tokens), unit, {}, notes)


def _block(shape: Shape) -> nn.Module:
    """Linear layers like those of a block, without memory."""
    layers = [
        nn.Linear(k, n, bias=False, device="meta") for name, n, k in shape.linears for _ in range(shape.repeats(name))
    ]
    return nn.ModuleList(layers)


def blockwise(shape: Shape, work: Work) -> Plan:
    """``--stream --activations host``, the recipe's default settings: what :func:`pyquant.recipes.memory.estimate` says."""
    how = Settings(target="both", start="gptq", batch_size=work.batch // work.gpus, steps=work.steps)
    own = -(-work.windows // work.gpus)
    need = estimate(
        _block(shape), shape.rest, shape.vocabulary, own, work.length, shape.hidden, how, 2, "host", shape.layers
    )
    local = min(work.gpus, int(value("GPUs of a host")))
    need = replace(need, host={name: size * local for name, size in need.host.items()})
    tokens = work.batch // work.gpus * work.length
    once = shape.used
    step = 6 * tokens * once / value("training rate") + shape.block * 100 / value("read bandwidth")
    seconds = shape.layers * (work.steps * step + 5 * 2 * own * work.length * once / value("prefill rate"))
    seconds += _gptq_seconds(shape, own * work.length) + 2.0 * shape.parameters / value("reading a checkpoint")
    unit = f"{work.windows} windows of {work.length} tokens, {work.steps} steps a block"
    return Plan("blockwise", work.gpus, need, seconds, unit, {"stream": "true", "activations": "host"})


def bisup(shape: Shape, work: Work) -> Plan:
    """Host rtn with all parts: two copies of the model, four streams of hidden states, one block in training."""
    own, tokens = -(-work.windows // work.gpus), work.batch // work.gpus * work.length
    per_weight = 24.0  # smoothed, adjusted, scaled and rounded, most of it in fp32; tensors alive were counted on a CPU
    inputs = 26.7 * (4 * shape.hidden + shape.mlp * (shape.active or 1))  # rounding of inputs, counted too
    device = {
        "two copies of the model": 4.0 * shape.parameters,
        "hidden states": 4 * 2.0 * own * work.length * shape.hidden,
        "block being trained": shape.block * per_weight,
        "activations of a step": tokens * (activations(shape) + inputs),
    }
    local = min(work.gpus, int(value("GPUs of a host")))
    host = {
        "checkpoint": 2.0 * shape.parameters * local,
        "python": value("python, torch and CUDA on the host") * local,
    }
    once = shape.used
    step = 6 * tokens * once / value("training rate") + shape.block * 300 / value("read bandwidth")
    seconds = shape.layers * (work.steps * step + 5 * 2 * own * work.length * once / value("prefill rate"))
    unit = f"{work.windows} windows of {work.length} tokens, {work.steps} steps a block"
    return Plan("bisup", work.gpus, Estimate(device, host), seconds, unit, {"host": "rtn"})


# ------------------------------------------------------------------------------------------------ serving


def serve(shape: Shape, work: Work) -> Plan:
    """``generate`` after ``prepare_for_inference``: 4-bit weights, embedding and head in bf16, prompts of ``length`` and then
    ``steps`` new tokens. Cut over GPUs up to the number of KV heads; beyond, whole copies share out the sequences."""
    cut = max(c for c in range(1, min(work.gpus, shape.kv_heads) + 1) if shape.kv_heads % c == 0 and work.gpus % c == 0)
    batch = -(-work.batch // (work.gpus // cut))
    slots = work.length + work.steps
    kv = 2.0 * batch * slots * shape.layers * shape.kv_heads * shape.head_size
    # a cache of few bits: codes, and scales of 16 bits for 128 values
    kv *= 2 if work.kv_bits == 16 else work.kv_bits / 8 + 2 * 2 / 128
    weights = value("weight in 4 bits") * shape.quantized
    q = shape.heads * shape.head_size + 2 * shape.kv_heads * shape.head_size
    prompt = 2.0 * batch * work.length * (3 * shape.hidden + (q + 3 * shape.mlp * (shape.active or 1)) / cut)
    device = {
        "quantized weights": weights / cut,
        "embedding and head": 2.0 * shape.rest,
        "keys and values": kv / cut,
        "prompts": prompt,
    }
    local = min(work.gpus, int(value("GPUs of a host")))
    host = {
        "checkpoint": (weights + 2.0 * shape.rest) * local,
        "python": value("python, torch and CUDA on the host") * local,
    }
    read = weights * (_touched(shape, batch)) / cut + 2.0 * shape.vocabulary * shape.hidden
    read += kv / cut * (1 - work.steps / 2 / slots)  # half of the new tokens, on average
    step = read / value("read bandwidth") * _over_bytes(batch)
    if cut > 1:
        step += 2 * shape.layers * 12e-6  # a sum over GPUs after attention and after the MLP
    blocks = shape.multiplied - shape.vocabulary * shape.hidden  # of a prompt only the last token meets the head
    seconds = work.steps * step + 2 * batch * work.length * blocks / cut / value("prefill rate")
    unit = f"{work.batch} prompts of {work.length} and {work.steps} new tokens; {work.batch / step:.0f} tokens/s"
    notes = [] if cut == work.gpus else [f"cut over {cut}, {work.gpus // cut} copies"]
    if shape.experts:
        notes.append("experts run in no fused step here: the time is that of their bytes")
    return Plan("serve", work.gpus, Estimate(device, host), seconds, unit, {"kv_bits": str(work.kv_bits)}, notes)


def _touched(shape: Shape, batch: int) -> float:
    """Share of the quantized weights that a step reads."""
    if not shape.experts:
        return 1.0
    experts = 1 - (1 - shape.active / shape.experts) ** batch
    always = sum(n * k for name, n, k in shape.linears if shape.repeats(name) == 1) / shape.block
    return always + (1 - always) * experts


def _over_bytes(batch: int) -> float:
    """Measured time of an 8B decode step over what its bytes alone would take, between the measured batches on a line."""
    known = {b: value(f"decode, batch {b}") * 1e-3 for b in (1, 8, 32)}
    eight = 0.515625 * 6.979e9 + 2 * 128256 * 4096
    ratios = {b: ms / ((eight + 4.0 * b * 576 * 32 * 1024) / value("read bandwidth")) for b, ms in known.items()}
    points = sorted(ratios)
    if batch >= points[-1]:
        return ratios[points[-1]]
    low = max(b for b in points if b <= batch)
    high = min(b for b in points if b > batch)
    return ratios[low] + (ratios[high] - ratios[low]) * (batch - low) / (high - low)
