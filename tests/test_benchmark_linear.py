"""The linear benchmark on a machine without a GPU: its ways, its gate, and peers that are not there."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import linear, peers, run, tables

ROOT = Path(__file__).resolve().parents[1]
K, N = 256, 96


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Random numbers asked for on the GPU are made on the CPU, and every call takes a millisecond."""
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device=None, **kwargs: randn(*size, **kwargs))
    monkeypatch.setattr(linear, "graph_us", lambda calls: (calls[0](), 1000.0)[1])
    monkeypatch.setattr(linear, "chain_us", lambda layers, x, calls, hand_on: (layers[0](x), 1000.0)[1])


CEILINGS = {"read_tbps": 4.0, "bf16_tflops": 700.0}


def test_rows_of_forward_and_backward(on_the_cpu):
    own = {name: peers.LINEAR[name] for name in peers.OWN}
    rows = linear.linear_rows(CEILINGS, [1, 20], [(K, N)], own) + linear.backward_rows(CEILINGS, [1, 20], [(K, N)])
    by_op = {op: {(r["impl"], r["M"]) for r in rows if r["op"] == op} for op in {r["op"] for r in rows}}
    assert by_op["linear_w4a16"] == {(impl, m) for impl in peers.OWN for m in (1, 20)}
    assert by_op["linear_w4a16_backward"] >= {(i, m) for i in ("pyquant", "expand", "cublas-bf16") for m in (1, 20)}
    assert all(r["us"] == r["baseline_us"] == 1000 for r in rows)
    assert all(r["roof_us"] == pytest.approx(linear.roof_us(r["M"], N, K, CEILINGS), abs=0.01) for r in rows)


def test_a_wrong_gradient_is_not_timed(on_the_cpu, monkeypatch):
    from pyquant.ops import linear as op

    expand = op._backward_expand
    wrong = lambda out, grad, words, scale, *rest: expand(out, grad, words, scale.roll(1, 1), *rest)  # noqa: E731
    monkeypatch.setattr(op, "_backward_expand", wrong)
    with pytest.raises(SystemExit, match=r"expand gradient at M=1 .* is wrong"):
        linear.backward_rows(CEILINGS, [1], [(K, N)])


def test_peers_that_are_absent_or_wrong_are_left_out_and_said_so(on_the_cpu, monkeypatch):
    def absent(w, group):
        raise ImportError("No module named 'absent'")

    def wrong(w, group):
        return lambda x: x @ w.roll(1, 0).T

    monkeypatch.setattr(
        peers, "LINEAR", {"pyquant": peers.pyquant, "absent": absent, "wrong": wrong, "good": peers.cublas}
    )
    said = []
    assert list(peers.available(say=said.append)) == ["pyquant", "good"]
    assert said[0] == "absent is left out: ImportError: No module named 'absent'"
    assert said[1].startswith("wrong is left out: RuntimeError: wrong is off by 1.4")


def test_codes_are_those_of_the_weight():
    w = torch.randn(40, 256)
    codes, scale = peers.codes_of(w, 128)
    w_hat = ((codes.float() - 8).unflatten(1, (-1, 128)) * scale[..., None]).flatten(1)
    assert (w_hat - w).abs().max() <= 0.5001 * scale.max()
    assert codes.min() >= 1, "the largest value of a group is 7 steps from the zero"


def test_backward_belongs_to_the_linear_family(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--family", "distill", "--backward"])
    with pytest.raises(SystemExit, match="belongs to --family linear"):
        run.main()


def test_the_suite_is_not_part_of_plain_runs():
    ask = [sys.executable, "-m", "pytest", "--collect-only", "-q"]
    done = subprocess.run([*ask, "benchmarks/test_linear.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "test_backward[4096x4096-1-fused]" in done.stdout
    assert 'testpaths = ["tests"]' in (ROOT / "pyproject.toml").read_text()


def test_the_table_has_a_column_for_each_peer_that_was_there():
    row = {"K": 8, "N": 4, "M": 1, "roof_us": 1.0}
    rows = [{**row, "impl": i, "us": us} for i, us in (("pyquant", 2.0), ("cublas-bf16", 5.0), ("humming", 3.0))]
    rows += [{**row, "M": 2, "impl": i, "us": us} for i, us in (("pyquant", 2.0), ("cublas-bf16", 4.0))]
    meta = {"gpu": "G", "torch": "2", "date": "d", "commit": "c" * 40, "ceilings": {"read_tbps": 1, "bf16_tflops": 2}}
    lines = tables.linear_table({"meta": meta, "rows": rows}, tables.LINEAR_PEERS).splitlines()
    assert lines[-4:] == [
        "| K x N | M | roof | pyquant | cuBLAS bf16 | humming | over cuBLAS |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 8 x 4 | 1 | 1.0 | **2.0** | 5.0 | 3.0 | 2.50x |",
        "| 8 x 4 | 2 | 1.0 | **2.0** | 4.0 | - | 2.00x |",
    ]


def humming_stub(monkeypatch, off=1.0):
    """A package with humming's calls: the weight in steps of 1/8, x in int8, and a product ``off`` times the right one."""

    class Layer(torch.nn.Module):
        def __init__(self, shape_n, shape_k, weight_config, input_config, torch_dtype):
            super().__init__()
            assert weight_config == {"dtype": "int4", "group_size": 128}
            self.register_buffer("weight", torch.empty(shape_n, shape_k, dtype=torch_dtype))
            self.input_config, self.humming_config = input_config, None
            self.weight_schema = types.SimpleNamespace(dequant_tensors=lambda tensors: tensors["weight"].float())

        def load_from_unquantized(self, w):
            self.weight.copy_((w * 8).round() / 8)

        def transform(self):
            self.humming_config = self.input_config

        def forward(self, x, input_scale=None, tuning_config=None):
            assert tuning_config == {"m": len(x)}
            codes, scale = (x, input_scale) if input_scale is not None else quantize(self.humming_config, x)
            return off * (codes.float() * scale) @ self.weight.float().T

    def quantize(config, x):
        assert config["dtype"] == "int8"
        scale = x.float().abs().amax(1, keepdim=True) / 127
        return (x / scale).round().to(torch.int8), scale

    tune = types.SimpleNamespace(get_heuristics_config=lambda config, shape_m: {"m": shape_m})
    monkeypatch.setitem(sys.modules, "humming", types.ModuleType("humming"))
    monkeypatch.setitem(sys.modules, "humming.tune", tune)
    monkeypatch.setitem(sys.modules, "humming.layer", types.SimpleNamespace(HummingLayer=Layer))
    monkeypatch.setitem(sys.modules, "humming.forward", types.SimpleNamespace(may_quant_input=quantize))


def test_humming_with_8_bit_activations_is_held_to_its_own_weight(monkeypatch):
    humming_stub(monkeypatch)
    torch.manual_seed(0)
    w, x = torch.randn(24, 256), torch.randn(5, 256)
    peer, most = peers.A8["humming-int8"](w, 128), peers.LOOKS_RIGHT_A8["int8"]
    codes, scale = peer.quantize(x)
    assert codes.dtype == torch.int8
    assert torch.equal(peer.multiply(codes, scale), peer(x))
    assert 1e-3 < peers.looks_right("peer", peer, peer.rounded(), x, most) < most
    with pytest.raises(RuntimeError, match="is off by"):  # the weight before rounding is too far away for 8 bits
        peers.looks_right("peer", peer, w, x, most)
    humming_stub(monkeypatch, off=1.03)
    with pytest.raises(RuntimeError, match="is off by"):
        peers.looks_right("peer", peers.A8["humming-int8"](w, 128), peer.rounded(), x, most)


def test_a_peer_that_fails_is_left_out_with_its_reason(monkeypatch):
    said = []
    assert peers.attempt("one", lambda: 1 / 0, said.append) is None
    assert said == ["one is left out: ZeroDivisionError: division by zero"]

    def fails(*_):
        raise NotImplementedError("no such shape")

    w = torch.randn(8, 128)
    assert linear._made("gemlite", fails, [w]) == []
    assert linear._peer_us("gemlite", [fails], w, torch.randn(2, 128), 4) is None
    with pytest.raises(NotImplementedError):  # ours may not
        linear._made("pyquant", fails, [w])
    monkeypatch.setattr(linear, "chain_us", lambda *_, **__: 3.0)
    assert linear._peer_us("gemlite", [lambda x: x @ w.T], w, torch.randn(2, 128), 4) == 3.0


def test_a_family_takes_its_own_peers(monkeypatch):
    for family, theirs in (("linear_w4a8", "gemlite"), ("linear", "humming-int8"), ("distill", "humming")):
        monkeypatch.setattr(sys, "argv", ["run", "--family", family, "--peers", theirs])
        with pytest.raises(SystemExit, match=f"--family {family} knows the peers"):
            run.main()
