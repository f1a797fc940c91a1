"""What ``pyquant quantize`` can be told: one pydantic model, filled from a YAML file, from flags, or from Python.

No heavy import here, so a misspelt key is reported at once. :func:`load_config` turns every complaint into one sentence
that names the key.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

Recipe = Literal["rtn", "gptq", "blockwise", "bisup", "kd-qat", "soft-qat"]
Range = Literal["minmax", "mse"]
Format = Literal["compressed-tensors", "gptq"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Settings that a resumed run may change: they do not touch the weights that come out.
FREE_TO_CHANGE = (
    "out", "overwrite", "resume", "format", "device", "dtype",
    "eval", "eval_windows", "eval_length", "eval_skip_chars",
)  # fmt: skip
# Of blockwise: where things are, which changes no bit of what is computed.
FREE_OF_BLOCKWISE = ("activations", "gpu_memory", "stream")
FREE_OF_KD = ("shard_teacher", "keep_gathered")


class KDSettings(BaseModel):
    """The training of ``--recipe kd-qat`` and ``soft-qat``: fields and defaults of
    :class:`~pyquant.recipes.kd_settings.KDConfig` and of its loss.

    Attributes:
        kl, ce: None is what the recipe is about: 2 and 0.5 of kd-qat, 0 and 1 of soft-qat.
        quantizer: of kd-qat; soft-qat has its own.
    """

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(1000, ge=1)
    batch_size: int = Field(8, ge=1)
    seq_len: int = Field(512, ge=2)
    grad_accum: int = Field(1, ge=1)
    lr: float = Field(2e-5, ge=0)
    scale_lr: float = Field(5e-6, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(20, ge=0)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    bf16: bool | None = None
    save_steps: int = Field(100, ge=1)
    max_grad_norm: float = Field(1.0, ge=0)
    freeze: tuple[str, ...] = ()
    freeze_at: int = Field(0, ge=0)
    kl: float | None = Field(None, ge=0)
    ce: float | None = Field(None, ge=0)
    temperature: float = Field(1.0, gt=0)
    reverse_kl: float = Field(0.0, ge=0)
    jsd: float = Field(0.0, ge=0)
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    features: float = Field(0.0, ge=0)
    feature_layers: tuple[int, ...] = ()
    fused_loss: bool | None = None
    quantizer: Literal["lsq", "range", "ste", "soft"] = "lsq"
    activation_bits: Literal[16, 8] = 16
    embedding_bits: Literal[16, 8] = 16
    head_bits: Literal[16, 8] = 16
    train_embeddings: bool = True
    train_head: bool = True
    weights: Literal["fp32", "bf16"] = "fp32"
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_torch_8bit"] = "adamw_torch"
    gradient_checkpointing: bool = False
    reuse_fake_quant: bool = False
    shard_teacher: bool = False
    keep_gathered: bool = False


class SoftSettings(BaseModel):
    """Rounding and clamping of ``--recipe soft-qat``: fields and defaults of
    :class:`pyquant.recipes.soft_qat.SoftQAT`."""

    model_config = ConfigDict(extra="forbid")

    rounding: Literal["ste", "sigmoid-a", "sigmoid-b"] = "sigmoid-b"
    clamp: Literal["hard", "sigmoid", "phi"] = "sigmoid"
    beta: float = Field(10.0, gt=0)
    soft_forward: bool = False
    schedule: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    start: float = Field(4.0, gt=0)
    end: float = Field(4.0, gt=0)


class GPTQSettings(BaseModel):
    """The calibration of ``--recipe gptq``; ``seq_len`` None is the model's context, at most 2048."""

    model_config = ConfigDict(extra="forbid")

    windows: int = Field(128, ge=1)
    seq_len: int | None = Field(None, ge=2)
    batch_size: int = Field(4, ge=1)
    act_order: bool = True
    damp: float = Field(0.01, gt=0, le=1)


class BlockwiseSettings(BaseModel):
    """The training of ``--recipe blockwise``: fields and defaults of :class:`pyquant.recipes.settings.Settings`, the
    calibration windows, and where things are kept.

    Attributes:
        windows, seq_len: calibration windows and tokens in one (None: the model's context, at most 2048).
        activations: where hidden states are: ``device``, ``host``, ``disk``, or the first of these with room (``auto``).
        gpu_memory: GiB of GPU memory to stay within; None is what is free.
        stream: read the checkpoint block by block instead of loading the model; None: where the GPU does not hold it.
    """

    model_config = ConfigDict(extra="forbid")

    window: int = Field(1, ge=1)
    stride: int | None = Field(None, ge=1)
    lookahead: int | Literal["end"] = 0
    target: Literal["fp", "block", "both"] = "both"
    start: Literal["minmax", "mse", "gptq", "awq"] = "gptq"
    learn: Literal["rounding", "clip", "weights"] = "rounding"
    ranges: bool = True
    reach: float = Field(0.5, gt=0)
    steps: int = Field(200, ge=0)
    batch_size: int = Field(8, ge=1)
    optimizer: Literal["sign-sgd", "adamw"] = "sign-sgd"
    lr: float | None = Field(None, gt=0)
    scale_lr: float = Field(1.0, ge=0)
    kl: float = Field(1.0, ge=0)
    end_mse: float = Field(1.0, ge=0)
    local: float = Field(0.0, ge=0)
    polish: int = Field(0, ge=0)
    polish_lr: float = Field(2e-3, gt=0)
    keep_best: bool = True
    act_order: bool = True
    damp: float = Field(0.01, gt=0, le=1)
    graphs: bool = True
    autocast: bool = True
    windows: int = Field(128, ge=1)
    seq_len: int | None = Field(None, ge=2)
    activations: Literal["auto", "device", "host", "disk"] = "auto"
    gpu_memory: float | None = Field(None, gt=0)
    stream: bool | None = None


class BiSupSettings(BaseModel):
    """``--recipe bisup``: fields and defaults of :class:`pyquant.recipes.bisup_settings.BiSup`, the calibration windows, and
    what is measured behind a prompt.

    Attributes:
        windows, seq_len: calibration windows and tokens in one (None: the model's context, at most 2048).
        prompt: text before every window in a second evaluation with low-bit K and V; ``""`` is a text of ours.
        kv_bits: of K and V there; None is ``act_bits``.
        storage: of the prompt's, see :mod:`pyquant.integrations.prompt`.
    """

    model_config = ConfigDict(extra="forbid")

    host: Literal["rtn", "atom", "quarot"] = "rtn"
    act_bits: int = Field(4, ge=2, le=16)
    act_group: Literal[-1, 32, 64, 128] | None = None
    act_clip: float | None = Field(None, gt=0, le=1)
    weight_clip: float | None = Field(None, gt=0, le=1)
    outliers: float = Field(1 / 32, ge=0, lt=1)
    outlier_bits: int = Field(8, ge=2, le=8)
    online: bool = True
    parts: tuple[str, ...] = ("clip", "smooth", "low-rank")
    steps: int = Field(320, ge=0)
    batch_size: int = Field(8, ge=1)
    lr_clip: float = Field(1e-2, ge=0)
    lr_act_clip: float = Field(1e-2, ge=0)
    lr_smooth: float = Field(5e-3, ge=0)
    lr_low_rank: float = Field(5e-4, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    clip_start: Literal["mse", "host"] = "mse"
    clip_most: float = Field(1 / (1 + math.exp(-4)), gt=0, lt=1)
    act_clipping: bool = True
    smooth_alpha: float | None = Field(None, ge=0, le=1)
    smooth_reach: float = Field(1.0, gt=0)
    rank: int = Field(16, ge=1)
    alpha: float = 4.0
    target: Literal["fp", "block", "both"] = "both"
    keep_best: bool = True
    graphs: bool = True
    autocast: bool = True
    windows: int = Field(128, ge=1)
    seq_len: int | None = Field(None, ge=2)
    prompt: str | None = None
    kv_bits: int | None = Field(None, ge=2, le=16)
    storage: Literal["none", "computed", "stored", "both"] = "both"

    @field_validator("parts", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        return tuple(filter(None, value.replace("+", ",").split(","))) if isinstance(value, str) else value


SECTIONS: dict[str, type[BaseModel]] = {
    "kd": KDSettings, "soft": SoftSettings, "gptq": GPTQSettings, "blockwise": BlockwiseSettings, "bisup": BiSupSettings,
}  # fmt: skip
_SECTIONS_OF = {  # recipe -> the sections that it reads
    "kd-qat": ("kd", "soft"), "soft-qat": ("kd", "soft"), "gptq": ("gptq",), "blockwise": ("blockwise",),
    "bisup": ("bisup",),
}  # fmt: skip
TRAINED = ("kd-qat", "soft-qat")  # recipes that train the whole model


class QuantizeConfig(BaseModel):
    """Everything one run of ``pyquant quantize`` needs.

    Attributes:
        model: folder of a Hugging Face checkpoint (or a name in the local Hugging Face cache).
        recipe: ``rtn`` (round to nearest, no data), ``gptq`` (column by column, some text), ``blockwise`` (roundings and
            ranges trained block by block, some text), ``bisup``
            (low-bit inputs too, some text), ``kd-qat`` (quantization-aware training with distillation) or
            ``soft-qat`` (the same with continuous rounding and clamping).
        bits, group_size, symmetric: the weight format; group size -1 is one scale per output channel.
        range: how the first range is found: ``mse`` (smallest squared error) or ``minmax``.
        include, exclude: shell-style patterns on module names or their tails.
        skip_experts: leave fused mixture-of-experts weights as they are instead of refusing the model.
        calibration: text of gptq, blockwise, bisup, kd-qat and soft-qat: a file, a folder, or a data set name.
        eval: texts to measure perplexity on, before and after.
        eval_windows: at most this many windows of each text; None is all of them.
        eval_length: tokens in a window; None is the model's context, at most 2048.
        eval_skip_chars: characters of each evaluation text to skip (for a text that was partly trained on).
        out: folder to write; must not exist unless ``overwrite``.
        format: ``compressed-tensors`` or ``gptq``.
        resume: continue the unfinished work beside ``out``.
        device, dtype: where and in which arithmetic; ``auto`` means the GPU in the checkpoint's dtype,
            or the CPU in float32.
        kd, soft, gptq, blockwise, bisup: settings of the recipes: ``kd`` of kd-qat and soft-qat, ``soft`` of soft-qat.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True)

    model: str
    recipe: Recipe = "rtn"
    bits: int = Field(4, ge=2, le=4)
    group_size: Literal[-1, 32, 64, 128] = 128
    symmetric: bool = True
    range: Range = "mse"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("lm_head",)
    skip_experts: bool = False
    calibration: str | None = None
    eval: tuple[str, ...] = ()
    eval_windows: int | None = Field(None, ge=1)
    eval_length: int | None = Field(None, ge=2)
    eval_skip_chars: int = Field(0, ge=0)
    out: Path
    format: Format = "compressed-tensors"
    overwrite: bool = False
    resume: bool = False
    device: Device = "auto"
    dtype: Dtype = "auto"
    seed: int = 0
    kd: KDSettings = Field(default_factory=KDSettings)
    soft: SoftSettings = Field(default_factory=SoftSettings)
    gptq: GPTQSettings = Field(default_factory=GPTQSettings)
    blockwise: BlockwiseSettings = Field(default_factory=BlockwiseSettings)
    bisup: BiSupSettings = Field(default_factory=BiSupSettings)

    @field_validator("include", "exclude", "eval", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def work(self) -> Path:
        """Where unfinished work is kept, beside ``out``."""
        return self.out.parent / f"{self.out.name}.work"

    def fixed(self) -> dict[str, Any]:
        """The settings that decide the resulting weights, JSON-ready and flat (``kd.steps``)."""
        fields = self.model_dump(mode="json", exclude=set(FREE_TO_CHANGE))
        sections = {name: fields.pop(name) for name in SECTIONS}
        for own in _SECTIONS_OF.get(self.recipe, ()):
            free = {"blockwise": FREE_OF_BLOCKWISE, "kd": FREE_OF_KD}.get(own, ())
            fields |= {f"{own}.{name}": value for name, value in sections[own].items() if name not in free}
        return fields


def known_keys() -> list[str]:
    """Every key of a recipe file, nested ones as ``kd.steps``."""
    nested = [f"{name}.{field}" for name, section in SECTIONS.items() for field in section.model_fields]
    return [*QuantizeConfig.model_fields, *nested]


def load_config(file: Path | None, flags: Mapping[str, Any]) -> QuantizeConfig:
    """A configuration from a YAML file overridden by flags.

    Args:
        file: the recipe, or None.
        flags: key -> value, nested keys as ``kd.steps``; None values are flags that were not given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key, or a value that does not fit, in one sentence that names the key.
    """
    settings: dict[str, Any] = {}
    if file is not None:
        settings = _read_yaml(file)
    for key, value in flags.items():
        if value is None:
            continue
        head, _, tail = key.partition(".")
        if tail:
            settings[head] = {**settings.get(head, {}), tail: value}
        else:
            settings[head] = value
    try:
        return QuantizeConfig(**settings)
    except ValidationError as error:
        raise ValueError(_sentence(error, file)) from error


def settings_of(pairs: Iterable[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as :func:`load_config` takes them; a value is read as YAML reads it.

    Raises:
        ValueError: a pair without ``=``.
    """
    import yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair}: write KEY=VALUE, as in kd.jsd=0.5")
        found[key] = yaml.safe_load(value)
    return found


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such recipe file")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {str(error).splitlines()[0]}") from error
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must hold keys and values, not a {type(settings).__name__}")
    for name in SECTIONS:
        if not isinstance(settings.get(name, {}), dict):
            raise ValueError(f"{file}: {name} must hold keys and values, not {settings[name]!r}")
    return settings


def _sentence(error: ValidationError, file: Path | None) -> str:
    """The first complaint of pydantic, with the key, the value, and near matches for an unknown key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    where = f"{file}: " if file else ""
    if first["type"] == "extra_forbidden":
        leaves = {known.rpartition(".")[2]: known for known in reversed(known_keys())}
        near = [leaves[m] for m in difflib.get_close_matches(key.rpartition(".")[2], leaves, n=3, cutoff=0.6)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(known_keys())}"
        return f"{where}unknown key {key!r}; {hint}"
    if first["type"] == "missing":
        return f"{where}{key} is missing"
    return f"{where}{key}={first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"
