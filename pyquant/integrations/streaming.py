"""A checkpoint read block by block: the model around its blocks in memory, the blocks only while they are needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pyquant.formats.spec import QuantSpec
from pyquant.integrations.checkpoint import check_causal, check_weights, read_config
from pyquant.integrations.evaluate import exp_mean
from pyquant.nn.linear import QLinear
from pyquant.recipes.activations import Activations
from pyquant.recipes.blocks import block_arguments, find_blocks, logits_of
from pyquant.recipes.blockwise import BlockResult
from pyquant.recipes.rtn import layer_errors
from pyquant.recipes.streams import FullPrecision, embedded, precision


class Reader:
    """Tensors of a checkpoint folder by name; files are mapped, nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        for file in check_weights(folder):
            with safe_open(file, framework="pt") as tensors:
                self.files |= dict.fromkeys(tensors.keys(), file)

    def get(self, names: list[str]) -> dict[str, Tensor]:
        """These tensors on the CPU."""
        found: dict[str, Tensor] = {}
        for file in sorted({self.files[name] for name in names}):
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in names if self.files[name] == file}
        return found


class Streamed:
    """A model whose blocks lie on the meta device, and the blocks by number (a :class:`~pyquant.recipes.streams.Blocks`).

    Args:
        folder: a checkpoint whose tensors have the names of the model's parameters.
        device: where the model is to be.
        dtype: of everything that is read; None keeps the checkpoint's.

    Attributes:
        model: embeddings, final norm and head on the device; blocks on meta.
        tokenizer: of the folder.
        layers: weight errors of the quantized layers, once assembled.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or one that stores its blocks in another form than the model
            holds them (named).
    """

    def __init__(self, folder: Path, device: str, dtype: torch.dtype | None = None) -> None:
        config = read_config(folder)
        check_causal(folder, config)
        self.reader = Reader(folder)
        self.stored = self.reader.get([next(iter(self.reader.files))]).popitem()[1].dtype
        self.device, self.dtype = torch.device(device), dtype or self.stored
        with parameters_on_meta():
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
        self.model.eval().requires_grad_(False)
        self.root, self.blocks = find_blocks(self.model)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        lacking = [n for n, _ in self.blocks.named_parameters() if f"{self.root}.{n}" not in self.reader.files]
        if lacking:
            raise ValueError(
                f"{folder} cannot be read block by block: it has no tensor {self.root}.{lacking[0]}, which the model holds "
                "in that form; --no-stream loads the whole model"
            )
        self.layers: list[dict[str, Any]] = []
        self._fill_rest()

    def _fill_rest(self) -> None:
        """Read what is not in the blocks; tied weights become one again."""
        own = {n for n, _ in self.model.named_parameters() if not n.startswith(self.root + ".")}
        held = sorted(own & self.reader.files.keys())
        for name, t in self.reader.get(held).items():
            parent, _, last = name.rpartition(".")
            t = t.to(self.device, self.dtype)
            setattr(self.model.get_submodule(parent), last, nn.Parameter(t, requires_grad=False))
        self.model.tie_weights()
        for name, p in self.model.named_parameters():
            if p.device.type == "meta" and not name.startswith(self.root + "."):
                raise ValueError(f"{self.reader.folder}: the tensor {name} is missing")
        for name, buffer in self.model.named_buffers():
            if not name.startswith(self.root + "."):
                parent, _, last = name.rpartition(".")
                self.model.get_submodule(parent)._buffers[last] = buffer.to(self.device)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Compute, and read blocks, in another dtype."""
        self.dtype = dtype
        for name, module in self.model.named_modules():
            if not f"{name}.".startswith(f"{self.root}."):
                for p in module.parameters(recurse=False):
                    p.data = p.data.to(dtype)

    def __len__(self) -> int:
        return len(self.blocks)

    def fetch(self, index: int) -> nn.Module:
        """A block read from the files, in eval mode on the device."""
        return self.read(index).to(self.device)

    def read(self, index: int) -> nn.Module:
        """A block on the CPU."""
        block = copy.deepcopy(self.blocks[index])
        prefix = f"{self.root}.{index}."
        state = self.reader.get([prefix + n for n, _ in block.named_parameters()])
        state = {n.removeprefix(prefix): t.to(self.dtype) for n, t in state.items()}
        block.load_state_dict(state, strict=False, assign=True)
        return block.eval().requires_grad_(False)

    @torch.no_grad()
    def perplexity(self, windows: Tensor, batch: int, place: str = "device", folder: Path | None = None) -> float:
        """As :func:`pyquant.integrations.evaluate.perplexity`, block by block."""
        batch = next(b for b in range(min(batch, len(windows)), 0, -1) if len(windows) % b == 0)
        context = precision(self.device, False)
        tokens = windows.to(self.device)
        _, arguments = block_arguments(self.model, self.blocks, tokens[:batch])
        stream = FullPrecision(self, arguments, batch, context)
        stream.begin(embedded(self.model, self.blocks, tokens, batch, place, folder, context))
        last: Activations = stream.at(len(self))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in range(0, len(windows), batch):
            logits = logits_of(self.model, self.blocks, last.rows(i, batch))
            for row, target in zip(logits[:, :-1], tokens[i : i + batch, 1:], strict=True):
                total += nn.functional.cross_entropy(row.float(), target, reduction="sum").double()
        return exp_mean(total.item(), windows)

    def assemble(self, results: dict[int, BlockResult], spec: QuantSpec, dtype: torch.dtype) -> nn.Module:
        """The model with quantized blocks, all on the device: each block is read once more and its layers replaced."""
        for index, result in results.items():
            block = self.read(index).to(self.device)
            before = {n: block.get_submodule(n).weight for n in result.layers}
            deploy(block, result, spec, dtype)
            rows = layer_errors(before, block)  # type: ignore[arg-type]
            self.layers += [row | {"name": f"{self.root}.{index}.{row['name']}"} for row in rows]
            self.blocks[index] = block
        return self.model


@torch.no_grad()
def deploy(block: nn.Module, result: BlockResult, spec: QuantSpec, dtype: torch.dtype) -> None:
    """Replace the finished layers of a block by QLinear whose scales have ``dtype``, in place."""
    for name, rounded in result.layers.items():
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        plain.weight = nn.Parameter(rounded.weight().to(rounded.codes.device), requires_grad=False)
        plain.bias = linear.bias
        layer = QLinear.from_range(plain, spec, rounded.scale, rounded.zero)
        parent, _, own = name.rpartition(".")
        setattr(block.get_submodule(parent), own, layer.to(dtype).train(linear.training))
    for name, t in result.other.items():
        block.get_parameter(name).data.copy_(t)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device, and real buffers."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, p: nn.Parameter | None) -> None:
        register(self, name, p)
        if p is not None and p.device.type != "meta":
            extra: dict[str, Any] = {"requires_grad": p.requires_grad}
            self._parameters[name] = nn.Parameter(p.to("meta"), **extra)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
