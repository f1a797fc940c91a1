"""KD-QAT runs: they learn, resume bit by bit, stop when asked, and say what is wrong."""

from __future__ import annotations

import copy
import errno
import json
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny import learnable_tokens, tiny_llama

from pyquant.formats.spec import QuantSpec
from pyquant.integrations import resume as disk
from pyquant.integrations.evaluate import probe_logits
from pyquant.integrations.trainer import Interrupted, KDConfig, train_kd
from pyquant.nn import FakeQuantLinear
from pyquant.recipes.kd_qat import KDLoss, convert, freeze, prepare

SPEC = QuantSpec(3, 32)
CONFIG = KDConfig(
    steps=12,
    batch_size=3,
    seq_len=16,
    grad_accum=2,
    lr=2e-3,
    scale_lr=1e-3,
    warmup_steps=2,
    save_steps=3,
    weight_decay=0.01,
)


def run(work_dir: Path, config: KDConfig = CONFIG, resume: bool = False, **kwargs):
    """A run on the tiny model, with dropout so that the random generators matter: (student, history)."""
    teacher = tiny_llama()
    student = tiny_llama(attention_dropout=0.1)
    history = train_kd(
        student, teacher, kwargs.pop("tokens", learnable_tokens()), config, SPEC, work_dir, resume, **kwargs
    )
    return student, history


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    return run(tmp_path_factory.mktemp("whole"))


def test_learns_and_leaves_the_teacher_alone(tmp_path):
    teacher = tiny_llama()
    student, before = copy.deepcopy(teacher), copy.deepcopy(teacher)
    seen = []
    config = KDConfig(steps=30, batch_size=8, seq_len=16, lr=3e-3, scale_lr=1e-3, warmup_steps=2, loss=KDLoss(0.0, 1.0))
    history = train_kd(student, teacher, learnable_tokens(), config, SPEC, tmp_path, False, seen.append)
    assert [row["step"] for row in history] == list(range(1, 31)) == [row["step"] for row in seen]
    assert set(history[0]) == {"step", "loss", "ce", "lr"}  # no teacher is run for cross entropy alone
    assert "seconds" in seen[0]
    assert sum(r["ce"] for r in history[-3:]) < 0.7 * sum(r["ce"] for r in history[:3])
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), before.parameters(), strict=True))
    assert sum(isinstance(m, FakeQuantLinear) for m in student.modules()) == 14
    assert not torch.are_deterministic_algorithms_enabled()


def test_kd_alone_brings_student_to_teacher(tmp_path):
    config = KDConfig(steps=40, batch_size=8, seq_len=16, lr=2e-3, scale_lr=1e-3, warmup_steps=2, loss=KDLoss(1.0, 0.0))
    teacher = tiny_llama()
    history = train_kd(copy.deepcopy(teacher), teacher, learnable_tokens(), config, SPEC, tmp_path)
    assert sum(r["kl"] for r in history[-4:]) < 0.6 * sum(r["kl"] for r in history[:4])


def test_runs_repeat_and_the_seed_matters(tmp_path, whole):
    again, history = run(tmp_path / "again")
    assert_same(again, whole[0])
    assert history == whole[1]
    _, other = run(tmp_path / "other", KDConfig(**{**vars(CONFIG), "seed": 1}))
    assert [r["loss"] for r in other] != [r["loss"] for r in history]


SCRIPT = """
    import sys
    sys.path.insert(0, {tests!r})
    import test_trainer as t
    t.run(t.Path({work!r}), t.KDConfig(**dict(vars(t.CONFIG), **{changes!r})), on_log=lambda row: print(row["step"],
    flush=True))
"""


def killed(work: Path, at: int, how: int, **changes) -> tuple[int, str]:
    """Start a run in a process of its own and send it a signal when it reports step ``at``: (return code, stderr)."""
    script = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent), work=str(work), changes=changes))
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    for line in process.stdout:
        if int(line) == at:
            process.send_signal(how)
            break
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def test_sigkill_then_resume_is_bit_exact(tmp_path, whole):
    at = random.Random().randint(3, 11)  # anywhere: the result must not depend on it
    code, errors = killed(tmp_path, at, signal.SIGKILL)
    assert code == -signal.SIGKILL, errors
    last = disk.latest(tmp_path)
    assert last is None or disk.step_of(last) < 12
    student, history = run(tmp_path, resume=True)
    assert history == whole[1], f"killed at {at}"
    assert_same(student, whole[0])


def test_sigint_saves_the_step_and_resumes_bit_exact(tmp_path, whole):
    code, errors = killed(tmp_path, 4, signal.SIGINT)
    assert code != 0
    assert "Interrupted" in errors
    assert "after step" in errors
    saved = disk.step_of(disk.latest(tmp_path))
    assert 4 <= saved < 12
    student, history = run(tmp_path, resume=True)
    assert history == whole[1]
    assert_same(student, whole[0])


def interrupt_at(step: int):
    def on_log(row):
        if row["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return on_log


def test_interrupted_names_the_step_and_restores_the_handler(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="after step 5") as caught:
        run(tmp_path, on_log=interrupt_at(5))
    assert caught.value.step == 5
    assert disk.latest(tmp_path).name == "checkpoint-5"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("stop", [5, 7, 9])
@pytest.mark.parametrize("quantizer", ["lsq", "ste"])
def test_freeze_in_the_middle_resumes_bit_exact(tmp_path, stop, quantizer):
    config = KDConfig(**{**vars(CONFIG), "freeze": ("v_proj", "o_proj"), "freeze_at": 7, "quantizer": quantizer})
    straight, history = run(tmp_path / "whole", config)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", config, on_log=interrupt_at(stop))
    student, resumed = run(tmp_path / "cut", config, resume=True)
    assert resumed == history
    assert_same(student, straight)
    assert (
        sorted(n.split(".")[-1] for n, m in student.named_modules() if getattr(m, "frozen", False))
        == ["o_proj"] * 2 + ["v_proj"] * 2
    )


def test_ov_freeze_keeps_snapped_weights_and_deploys_them(tmp_path):
    config = KDConfig(**{**vars(CONFIG), "freeze": ("v_proj", "o_proj")})
    student, _ = run(tmp_path, config)
    start = tiny_llama()
    prepare(start, SPEC)
    names = freeze(start)
    assert len(names) == 4
    trained, untouched = dict(student.named_modules()), dict(start.named_modules())
    for name, layer in untouched.items():
        if isinstance(layer, FakeQuantLinear):
            assert torch.equal(trained[name].weight, layer.weight) == (name in names), name
    frozen = {name: trained[name].weight.clone() for name in names}
    convert(student)
    for name, weight in frozen.items():
        assert torch.equal(student.get_submodule(name).dequantize(), weight)


def test_convert_in_fp32_computes_what_was_trained(whole):
    student = copy.deepcopy(whole[0])
    before = probe_logits(student, learnable_tokens()[:2])
    convert(student, torch.float32)
    assert not any(isinstance(m, FakeQuantLinear) for m in student.modules())
    torch.testing.assert_close(probe_logits(student, learnable_tokens()[:2]), before, rtol=0, atol=0)


def test_finished_run_is_returned_again(tmp_path, whole):
    run(tmp_path)
    seen = []
    student, history = run(tmp_path, resume=True, on_log=seen.append)
    assert history == whole[1]
    assert seen == []
    assert_same(student, whole[0])


@pytest.mark.parametrize("damage", ["truncated", "no manifest", "missing", "unrenamed"])
def test_half_written_checkpoint_is_passed_over(tmp_path, whole, damage):
    with pytest.raises(Interrupted):
        run(tmp_path, on_log=interrupt_at(8))
    newest = tmp_path / "checkpoint-8"
    if damage == "truncated":
        data = (newest / "optimizer.safetensors").read_bytes()
        (newest / "optimizer.safetensors").write_bytes(data[: len(data) // 2])
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "missing":
        (newest / "model.safetensors").unlink()
    else:
        newest.rename(tmp_path / "checkpoint-8.partial")
    assert disk.latest(tmp_path).name == "checkpoint-6"
    student, history = run(tmp_path, resume=True)
    assert history == whole[1]
    assert_same(student, whole[0])
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]


def test_no_pickles(tmp_path):
    run(tmp_path)
    kinds = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert kinds == {".safetensors", ".json"}


def test_another_config_is_refused_by_name(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, on_log=interrupt_at(4))
    with pytest.raises(ValueError, match=r"lr \(was 0.002, now 0.001\)") as caught:
        run(tmp_path, KDConfig(**{**vars(CONFIG), "lr": 1e-3}), resume=True)
    assert "scale_lr" not in str(caught.value)
    with pytest.raises(ValueError, match="data"):
        run(tmp_path, tokens=learnable_tokens(seed=9), resume=True)
    with pytest.raises(FileExistsError, match="step 4"):
        run(tmp_path)
    run(tmp_path, KDConfig(**{**vars(CONFIG), "save_steps": 5}), resume=True)  # changes nothing in the result


def test_nan_loss_stops_with_the_step(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step \d+.*lr=1e\+30"):
        run(tmp_path, KDConfig(**{**vars(CONFIG), "lr": 1e30, "max_grad_norm": 0.0}))


def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr("pyquant.integrations.trainer.Distillation.__call__", full)
    with pytest.raises(
        RuntimeError, match=r"step 1 with batch_size=3, seq_len=16: lower batch_size.*gradient_checkpointing"
    ):
        run(tmp_path)


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    save_file = disk.save_file
    calls = []

    def full(tensors, path, **kwargs):
        calls.append(path)
        if len(calls) > 4:  # in the middle of the second checkpoint
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(disk, "save_file", full)
    with pytest.raises(OSError, match="is full: step 6 could not be saved; step 3 is still there") as caught:
        run(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = train(tmp_path / "a", False)
    assert_same(train(tmp_path / "b", True), plain)


def train(work_dir: Path, checkpointing: bool):
    student, teacher = tiny_llama(), tiny_llama()
    config = KDConfig(steps=3, batch_size=3, seq_len=16, lr=1e-3, gradient_checkpointing=checkpointing)
    train_kd(student, teacher, learnable_tokens(), config, SPEC, work_dir)
    assert not student.is_gradient_checkpointing
    return student


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 8}, r"seq_len=8\], got torch.int64 \(24, 16\)"),
        ({"freeze": ("nothing",)}, "freeze='nothing' matches none of the 14"),
        ({"freeze": ("v_proj",), "freeze_at": 12}, "freeze_at=12 is never reached in 12 steps"),
        ({"quantizer": "magic"}, "unknown quantizer 'magic'"),
    ],
)
def test_bad_settings_are_refused_before_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, KDConfig(**{**vars(CONFIG), **changes}))


def test_bad_inputs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="tokens reach 900, the student's vocabulary has 288"):
        run(tmp_path, tokens=torch.full((4, 16), 900))
    model = tiny_llama()
    with pytest.raises(ValueError, match="the same object"):
        train_kd(model, model, learnable_tokens(), CONFIG, SPEC, tmp_path)
    with pytest.raises(ValueError, match="steps=0"):
        KDConfig(steps=0)
    with pytest.raises(ValueError, match="unknown schedule 'sine'"):
        KDConfig(schedule="sine")


def test_resumed_state_matters(tmp_path, whole):
    """The comparison can fail: a resume that loses the optimizer's moments ends elsewhere."""
    with pytest.raises(Interrupted):
        run(tmp_path, on_log=interrupt_at(6))
    checkpoint = tmp_path / "checkpoint-6"
    tensors = disk.load_file(checkpoint / "optimizer.safetensors")
    disk.save_file(
        {k: torch.zeros_like(t) if "exp_avg" in k else t for k, t in tensors.items()},
        checkpoint / "optimizer.safetensors",
    )
    sizes = {p.name: p.stat().st_size for p in checkpoint.iterdir() if p.name != "manifest.json"}
    (checkpoint / "manifest.json").write_text(json.dumps(sizes))
    student, _ = run(tmp_path, resume=True)
    with pytest.raises(AssertionError):
        assert_same(student, whole[0])
