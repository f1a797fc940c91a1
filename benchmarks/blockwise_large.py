"""``python -m benchmarks.blockwise_large WORK``: block-wise quantization of a model of 8 B parameters on one GPU.

Makes a checkpoint of that shape with random weights in WORK (16 GB; kept and used again), quantizes it block by block from
its files, exports, loads back, and writes minutes and peaks to ``--out``. Random weights and tokens: what is measured is
time and memory. A killed run goes on where it was (``--resume``), ``torchrun --nproc-per-node 2 -m
benchmarks.blockwise_large`` shares the windows out over GPUs. The steps are those of
``pyquant quantize WORK/model --recipe blockwise --bits 4 --group-size 128 --stream --activations host``, without the text.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks.ptq import commit
from pyquant.formats.spec import QuantSpec
from pyquant.integrations.blockwise import quantize_blocks
from pyquant.integrations.evaluate import probe_logits
from pyquant.integrations.events import Clock
from pyquant.integrations.export import export, verify
from pyquant.integrations.machine import peak_memory, versions
from pyquant.integrations.streaming import Streamed
from pyquant.integrations.work import checkpoint_digest
from pyquant.recipes.ranks import Ranks
from pyquant.recipes.settings import Settings

SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "mid": {
        "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 1, "vocab_size": 4096,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024,
    },
}  # fmt: skip


def make(folder: Path, shape: dict[str, int]) -> None:
    """A Llama checkpoint with random weights, a file for each block."""
    if (folder / "model.safetensors.index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**shape, tie_word_embeddings=False, max_position_embeddings=8192, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    h, i, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)
    names: dict[str, str] = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {}
        for name, size in shapes.items():
            t = torch.ones(size, device=device, dtype=torch.bfloat16)
            if len(size) == 2:
                t = (torch.randn(size, generator=draw, device=device) * size[1] ** -0.5).bfloat16()
            tensors[name] = t.cpu()
            names[name] = file
        save_file(tensors, folder / file, {"format": "pt"})

    write("rest.safetensors", {"model.embed_tokens.weight": (config.vocab_size, h), "model.norm.weight": (h,),
                               "lm_head.weight": (config.vocab_size, h)})  # fmt: skip
    for b in range(config.num_hidden_layers):
        own = {
            "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i),
            "input_layernorm": (h,), "post_attention_layernorm": (h,),
        }  # fmt: skip
        write(f"block-{b:03d}.safetensors", {f"model.layers.{b}.{name}.weight": size for name, size in own.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder with 30 GB free")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--make-only", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--start", default="gptq")
    parser.add_argument("--activations", default="host", help="host is the low-memory setting")
    parser.add_argument("--gpu-memory", type=float, default=24.0, help="GiB to stay within")
    parser.add_argument("--commit", help="of the working tree, where git does not know it")
    args = parser.parse_args()
    clock = Clock()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda":
        torch.cuda.set_device(rank)
    if size > 1:
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    with clock("make the checkpoint"):
        if rank == 0:
            make(args.work / "model", SHAPES[args.shape])
        Ranks().wait()
    print(f"checkpoint there after {clock.seconds['make the checkpoint']:.0f} s", flush=True)
    if args.make_only:
        return
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    spec, settings = QuantSpec(4, 128), Settings(steps=args.steps, batch_size=args.batch_size, start=args.start)
    with clock("read the rest"):
        streamed = Streamed(args.work / "model", device)
    vocabulary = streamed.model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (args.windows, args.length), generator=torch.Generator().manual_seed(0))
    layers = [n for n, m in streamed.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    began = time.monotonic()

    def say(done: int, total: int, note: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {done}/{total}  {note}", flush=True)

    with clock("quantize"):
        found, memory = quantize_blocks(
            streamed.model, streamed, tokens, spec, settings, layers, streamed.stored,
            checkpoint_digest(args.work / "model"), args.work / "blocks", args.resume, args.activations, args.gpu_memory,
            say if args.shape == "tiny" else lambda d, t, n: None if d % args.steps or rank else say(d, t, n),
        )  # fmt: skip
    gpu: dict[str, Any] = {}
    if device == "cuda":
        gpu = {"allocated_gib": torch.cuda.max_memory_allocated() / 2**30}
        gpu["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    if rank:
        return
    model, probe = streamed.model, tokens[:1, :16]
    expected = probe_logits(model, probe)
    with clock("export"):
        export(
            model, streamed.tokenizer, args.work / "model", args.work / "quantized", spec, "compressed-tensors", True
        )
    with clock("load back and compare"):
        difference = verify(
            args.work / "quantized", probe, expected, next(model.parameters()).dtype, torch.device(device)
        )
    about = versions(device)
    meta = {
        "shape": args.shape, "spec": str(spec), "gpu": about["device"], "versions": about, "processes": size,
        "commit": args.commit or commit(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    row = {
        "tokens": args.windows * args.length, "steps": args.steps, "batch_size": args.batch_size, "start": args.start,
        "activations": args.activations, "seconds": clock.seconds, "minutes": clock.seconds["quantize"] / 60, "memory": gpu,
        "peak": peak_memory(), "expected": memory, "max_difference": difference, "blocks": len(found.blocks),
        "notes": found.notes,
    }  # fmt: skip
    facts = {"meta": meta, "rows": [row]}
    print(json.dumps(facts, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
