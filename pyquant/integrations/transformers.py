"""transformers plug-in: quantize while loading, load quantized checkpoints onto our kernels, save them for everyone.

* ``AutoModelForCausalLM.from_pretrained(dir, quantization_config=PyQuantConfig(...))`` quantizes a full-precision
  checkpoint by rounding to nearest, layer by layer as the weights arrive.
* :func:`load_model` loads a quantized checkpoint (compressed-tensors ``pack-quantized``, ours or another tool's) with
  :class:`~pyquant.nn.QLinear` in place of its linear layers.
* ``save_pretrained`` of either writes compressed-tensors again, so any tool that reads that format reads it.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyquant.formats.spec import ActSpec, QuantSpec
from pyquant.integrations.act_config import act_of, input_activations, set_act
from pyquant.integrations.checkpoint import check_causal, check_weights, local_folder, read_config
from pyquant.nn.linear import QLinear
from pyquant.nn.parallel import COLUMN, ROW, parallelize
from pyquant.nn.swap import matches, swap
from pyquant.recipes.rtn import check_deployable

METHOD = "pyquant"


def compressed_tensors_config(spec: QuantSpec, ignore: list[str], act: ActSpec | None = None) -> dict[str, Any]:
    """``quantization_config`` of a compressed-tensors ``pack-quantized`` checkpoint.

    Args:
        spec: bits, group size, symmetry.
        ignore: names of the linear layers that are not quantized.
        act: how the inputs of the others are, None for 16 bits.
    """
    per_channel = spec.group_size == -1
    weights = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else spec.group_size,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "format": "pack-quantized",
        "weights": weights,
        "input_activations": input_activations(act),
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": {"group_0": group},
    }


def spec_of(quantization_config: dict[str, Any], where: str = "the checkpoint") -> QuantSpec:
    """The spec of a compressed-tensors ``quantization_config``.

    Raises:
        ValueError: for anything but one group of 2..4-bit integer weights, saying what it is.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(
            f"{where} is not loadable here: {what}; QLinear reads pack-quantized integer weights of 2..4 bits"
        )

    if quantization_config.get("format") != "pack-quantized":
        raise refuse(f"its format is {quantization_config.get('format')!r}")
    groups = list((quantization_config.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise refuse(f"it has {len(groups)} config groups instead of 1")
    weights = groups[0].get("weights") or {}
    if groups[0].get("targets") != ["Linear"]:
        raise refuse(f"its targets are {groups[0].get('targets')} instead of ['Linear']")
    if groups[0].get("output_activations"):
        raise refuse("its outputs are quantized")
    try:
        act_of(groups[0].get("input_activations"))
    except ValueError as error:
        raise refuse(str(error)) from None
    if weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel"):
        raise refuse(f"its weights are {weights.get('type')} with strategy {weights.get('strategy')!r}")
    if weights.get("actorder") == "group":
        raise refuse("its groups are in activation order (g_idx)")
    if not 2 <= weights.get("num_bits", 0) <= 4:
        raise refuse(f"its weights have {weights.get('num_bits')} bits")
    group_size = -1 if weights["strategy"] == "channel" else weights.get("group_size")
    return QuantSpec(weights["num_bits"], group_size, weights.get("symmetric", True))


class PyQuantConfig(QuantizationConfigMixin):
    """How :class:`PyQuantQuantizer` loads a model.

    Args:
        bits, group_size, symmetric: as :class:`~pyquant.formats.spec.QuantSpec`.
        rule: range of on-the-fly quantization, ``minmax`` or ``mse``.
        include, exclude: shell-style patterns on layer names, for on-the-fly quantization.
        skip_experts: leave fused mixture-of-experts weights in high precision instead of refusing them.
        ignore: linear layers that are not quantized, names or ``"re:..."``; known from the checkpoint, or once loaded.
        act_bits, act_group_size, act_kind: as :class:`~pyquant.formats.spec.ActSpec`, for the inputs of quantized layers;
            16 bits are inputs as they are.

    Raises:
        ValueError: for widths or group sizes that no kernel holds.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = True,
        rule: str = "minmax",
        include: list[str] | tuple[str, ...] = ("*",),
        exclude: list[str] | tuple[str, ...] = ("lm_head",),
        skip_experts: bool = False,
        ignore: list[str] | None = None,
        act_bits: int = 16,
        act_group_size: int = -1,
        act_kind: str = "int",
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.rule, self.skip_experts = rule, skip_experts
        self.include, self.exclude = list(include), list(exclude)
        self.ignore = list(ignore or [])
        self.act_bits, self.act_group_size, self.act_kind = act_bits, act_group_size, act_kind
        check_deployable(self.spec)
        ActSpec(8 if act_bits == 16 else act_bits, act_group_size, kind=act_kind)  # raises where there is none such

    @property
    def spec(self) -> QuantSpec:
        """Bits, group size and symmetry as one object."""
        return QuantSpec(self.bits, self.group_size, self.symmetric)

    @property
    def act(self) -> ActSpec | None:
        """How inputs are quantized, or None."""
        return None if self.act_bits == 16 else ActSpec(self.act_bits, self.act_group_size, kind=self.act_kind)

    def ignores(self, name: str) -> bool:
        """Whether a layer of a quantized checkpoint is in high precision."""
        return any(re.match(i[3:], name) if i.startswith("re:") else i == name for i in self.ignore)

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds: the compressed-tensors form, which others read as well."""
        return compressed_tensors_config(self.spec, self.ignore, self.act)

    def fields(self) -> dict[str, Any]:
        """The arguments, with ``quant_method``: what makes from_pretrained choose this plug-in."""
        return copy.deepcopy(self.__dict__)

    @classmethod
    def from_compressed_tensors(cls, config: dict[str, Any], where: str = "the checkpoint") -> PyQuantConfig:
        """The config that loads a compressed-tensors checkpoint.

        Raises:
            ValueError: as :func:`spec_of`.
        """
        spec = spec_of(config, where)
        (group,) = config["config_groups"].values()
        act = act_of(group.get("input_activations"))
        inputs: dict[str, Any] = (
            {} if act is None else {"act_bits": act.bits, "act_group_size": act.group_size, "act_kind": act.kind}
        )
        return cls(**spec.to_dict(), ignore=config.get("ignore"), **inputs)


class _Quantize(ConversionOps):
    """Called by the loader with each weight that is to be quantized: puts a QLinear where the nn.Linear was."""

    def __init__(self, config: PyQuantConfig) -> None:
        self.config = config

    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        value = next(iter(input_dict.values()))
        value = value[0] if isinstance(value, list) else value
        name = full_layer_name.rpartition(".")[0]
        linear = model.get_submodule(name)
        bias, linear.bias = linear.bias, None  # it may not be loaded yet: from_linear must not copy it
        linear.weight = nn.Parameter(value, requires_grad=False)
        layer = QLinear.from_linear(linear, self.config.spec, self.config.rule)
        layer.bias = bias
        for buffer in layer.buffers():
            buffer._is_hf_initialized = True
        path, child = name.rpartition(".")[::2]
        setattr(model.get_submodule(path), child, layer)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


class PyQuantQuantizer(HfQuantizer):
    """What ``from_pretrained`` finds under ``quant_method: pyquant``; its hooks are those of transformers 5."""

    requires_calibration = False

    def __init__(self, quantization_config: PyQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.targets: set[str] = set()
        self.rules: dict[str, str] = {}
        self.shapes: dict[str, torch.Size] = {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        name, _, own = param_name.rpartition(".")
        return own == "weight" and name in self.targets

    def param_element_size(self, model: nn.Module, param_name: str, *args: Any, **kwargs: Any) -> float:
        if not self.pre_quantized and self.param_needs_quantization(model, param_name):
            return 0.5
        return super().param_element_size(model, param_name, *args, **kwargs)

    def get_quantize_ops(self, *args: Any, **kwargs: Any) -> ConversionOps:
        return _Quantize(self.quantization_config)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config, spec = self.quantization_config, self.quantization_config.spec
        if self.pre_quantized:
            include, exclude = (
                ["*"],
                [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and config.ignores(n)],
            )
            skip_experts = True  # a checkpoint is what it is: its experts load as they were saved

            def replace(name: str, linear: nn.Linear) -> nn.Module:
                bias = linear.bias is not None
                return QLinear(
                    linear.in_features, linear.out_features, bias, spec, "meta", linear.weight.dtype, config.act
                )
        else:
            include, exclude, skip_experts = config.include, config.exclude, config.skip_experts

            def replace(name: str, linear: nn.Linear) -> nn.Module:
                return (
                    linear  # keeps its weight until _Quantize has seen it: a key that the model lacks would be dropped
                )

        head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
        tied = (
            head
            and getattr(model.config, "tie_word_embeddings", False)
            and f"{head}.weight" in model.all_tied_weights_keys
        )
        if tied and matches(head, include) and not matches(head, exclude):
            raise ValueError(f"{head} shares its weight with the embedding and cannot be quantized; exclude it")
        report = swap(model, spec, replace, include, exclude, skip_experts)
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.targets = set(report.changed)
        self._take_rules(model)
        config.ignore = [
            name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in self.targets
        ]
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, p in model.named_parameters():  # transformers does not compare shapes when a quantizer is in charge
            if name in self.shapes and p.shape != self.shapes[name]:
                raise ValueError(f"{name} has shape {tuple(p.shape)}, the config says {tuple(self.shapes[name])}")
        if not self.pre_quantized:
            left = [n for n in self.targets if not isinstance(model.get_submodule(n), QLinear)]
            if left:
                raise ValueError(f"the checkpoint has no weight for {len(left)} layer(s) such as {min(left)}")
            set_act(model, self.quantization_config.act)
            self._cut(model)
            return model
        for name, module in model.named_modules():
            if not isinstance(module, QLinear):
                continue
            for own, buffer in module.named_buffers():
                if buffer.is_meta or not getattr(buffer, "_is_hf_initialized", False):
                    raise ValueError(
                        f"the checkpoint has no {name}.{own}, or quantizes other layers than its config says"
                    )
            dtype = module.weight_scale.dtype
            try:
                module.prepare()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if module.bias is not None and module.bias.dtype != dtype:
                module.bias.data = module.bias.data.to(dtype)
        self._cut(model)
        return model

    # transformers cuts parameters and the forward of modules that its tensor-parallel plan names. The packed weight of a
    # QLinear is cut otherwise, so the plan's rules for such layers are ours: taken out before it is carried out, and carried
    # out when the weights are there.

    def _take_rules(self, model: nn.Module) -> None:
        plan: dict[str, str] = getattr(model, "_tp_plan", None) or {}
        ours = {re.sub(r"\.\d+\.", ".*.", name) for name in self.targets}
        self.rules = {rule: plan.pop(rule) for rule in list(plan) if rule in ours}

    def _cut(self, model: nn.Module) -> None:
        mesh, size = getattr(model, "_device_mesh", None), getattr(model, "_tp_size", None) or 1
        if mesh is None or size == 1:
            model._tp_plan = {**(getattr(model, "_tp_plan", None) or {}), **self.rules}  # type: ignore[assignment]
            return
        mesh = mesh["tp"] if mesh.ndim > 1 else mesh
        unknown = sorted(set(self.rules.values()) - {COLUMN, ROW})
        if unknown:
            raise ValueError(
                f"the tensor-parallel plan has {', '.join(unknown)} layers; {COLUMN} and {ROW} can be cut here"
            )
        parallelize(model, mesh.get_local_rank(), size, self.rules, mesh.get_group())


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a reloaded module must not raise
    register_quantization_config(METHOD)(PyQuantConfig)
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(PyQuantQuantizer)


def load_model(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    tp_plan: str | dict[str, str] | None = None,
) -> nn.Module:
    """Load a compressed-tensors ``pack-quantized`` checkpoint onto our kernels.

    Args:
        path: folder of the checkpoint, or its name on the Hub.
        dtype: of scales, activations and all that is not quantized; ``"auto"`` is the checkpoint's. fp32 holds the
            values of a bf16 or fp16 checkpoint exactly.
        device: where the model goes.
        tp_plan: tensor parallel over the processes of ``torchrun``, ``"auto"`` or as transformers takes it: each process
            reads the 4-bit weights and keeps its share (:mod:`pyquant.nn.parallel`), on the device that transformers
            gives it. What is not quantized transformers cuts by its own plan.

    Returns:
        the model in eval mode, with :class:`~pyquant.nn.QLinear` layers.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a quantized checkpoint, one that QLinear does not hold, tensors missing or left over, or layers that
            cannot be cut.
    """
    folder = local_folder(path)
    quantization = read_config(folder).get("quantization_config")
    if not quantization:
        raise ValueError(f"{folder} is not quantized: its config.json has no quantization_config")
    if quantization.get("quant_method") != "compressed-tensors":
        raise ValueError(
            f"{folder} is {quantization.get('quant_method')!r}; only compressed-tensors checkpoints load here"
        )
    check_weights(folder)
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = PyQuantConfig.from_compressed_tensors(quantization, str(folder)).fields()
    return from_folder(folder, config, dtype, device, tp_plan)


def from_folder(
    folder: Path,
    config: Any,
    dtype: str | torch.dtype,
    device: str | torch.device,
    tp_plan: str | dict[str, str] | None = None,
) -> nn.Module:
    """``from_pretrained`` that refuses a checkpoint with missing or left-over tensors instead of inventing weights.

    Raises:
        ValueError: naming the tensors.
    """
    spread: dict[str, Any] = {}
    if tp_plan is not None:
        from transformers.distributed import DistributedConfig

        spread["distributed_config"] = DistributedConfig(tp_plan=tp_plan)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported, and refused below
        **spread,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(str(key) for key in info.get(kind) or ()):
            raise ValueError(
                f"{folder}: {len(found)} {kind.replace('_', ' ')} such as {found[0]}; the weights do not fit the config"
            )
    return model.eval() if spread else model.eval().to(device)


def load_causal_lm(
    path: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[nn.Module, Any]:
    """Load a full-precision causal language model and its tokenizer, safetensors only.

    Args:
        path: folder, or name on the Hub.
        dtype: of the weights; ``"auto"`` is the checkpoint's.
        device: where the model goes.

    Returns:
        (model in eval mode, tokenizer).

    Raises:
        FileNotFoundError: no such folder, or no ``config.json`` in it.
        ValueError: ``config.json`` broken, not a causal LM, already quantized, pickled weights only, a damaged or
            missing weights file, tensors that do not fit, NaN or Inf weights, or no tokenizer.
    """
    folder = local_folder(path)
    config = read_config(folder)
    check_causal(folder, config)
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise ValueError(f"{folder} is already quantized ({method}); start from the full-precision model")
    check_weights(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} has no usable tokenizer: {str(error).splitlines()[0]}") from None
    model = from_folder(folder, AutoConfig.from_pretrained(folder), dtype, "cpu")
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            bad = int((~torch.isfinite(p)).sum())
            raise ValueError(
                f"{folder}: {name} has {bad:,} NaN or Inf value(s) of {p.numel():,}; the checkpoint is damaged"
            )
    return model.to(device), tokenizer
