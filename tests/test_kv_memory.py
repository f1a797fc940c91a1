"""Memory of a long cache as the system sees it: 131,072 tokens of an 8B shape (32 layers, 8 KV heads of 128 channels).

Measured, not computed from shapes: on a CPU the resident pages of a process of its own before and after one layer is filled, on
a GPU what the allocator has handed out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from pyquant.nn.kv_cache import KVLayer, KVSettings

TOKENS, LAYERS, HEADS, SIZE, CHUNK = 1 << 17, 32, 8, 128, 4096
MOST = 0.30  # of 16 bits, for 4
SCRIPT = """
import ctypes, gc, json, os, sys
import torch
from test_kv_memory import fill
torch.set_num_threads(1)

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

fill(int(sys.argv[1]), "cpu", 300)  # whatever is allocated once: index tables, libraries
before = resident()
layer = fill(int(sys.argv[1]), "cpu", int(sys.argv[2]))
print(json.dumps([resident() - before, getattr(layer, "nbytes", 0)]))
"""


def fill(bits, device, tokens):
    """One layer of random keys and values, by chunks; 16 bits are transformers' own layer, which keeps tokens as they come."""
    new = [torch.randn(1, HEADS, CHUNK, SIZE, device=device).bfloat16() for _ in range(2)]
    if bits == 16:
        layer = DynamicLayer()
        layer.update(*(t.repeat(1, 1, -(-tokens // CHUNK), 1)[:, :, :tokens].contiguous() for t in new))
        return layer
    layer = KVLayer(KVSettings(bits, 128, 128, tokens), 1, HEADS, SIZE, torch.bfloat16, device)
    for i in range(0, tokens, CHUNK):
        layer.add(*(t[:, :, : tokens - i] for t in new))
    return layer


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads resident memory as Linux tells it, with glibc")
def test_a_long_cache_in_resident_memory():
    """One layer, scratch given back."""
    found = {}
    for bits in (16, 4):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(bits), str(TOKENS)], cwd=os.path.dirname(__file__), check=True,
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        found[bits] = json.loads(done.stdout)
    full, (few, claimed) = found[16][0], found[4]
    assert full == pytest.approx(2 * 2 * TOKENS * HEADS * SIZE, rel=0.02), (
        "what is measured is keys and values in 16 bits"
    )
    print(
        f"{LAYERS} layers: {LAYERS * full / 2**30:.2f} GiB in 16 bits, {LAYERS * few / 2**30:.2f} in 4, {few / full:.3f} x"
    )
    assert few <= MOST * full, f"{few / full:.3f} of 16 bits"
    assert few == pytest.approx(claimed, rel=0.03), "KVLayer.nbytes says what is resident"


@pytest.mark.gpu
def test_a_long_cache_on_a_gpu():
    """All 32 layers, as torch's allocator counts them."""
    held = {}
    for bits in (16, 4):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        layers = [fill(bits, "cuda", TOKENS) for _ in range(LAYERS)]
        torch.cuda.synchronize()
        held[bits] = torch.cuda.memory_allocated() - before
        del layers
    print({bits: f"{size / 2**30:.2f} GiB" for bits, size in held.items()})
    assert held[16] >= LAYERS * 4 * TOKENS * HEADS * SIZE
    assert held[4] <= MOST * held[16]
