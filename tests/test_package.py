"""The package as installed: public names, the extension when it is built, and what `pyquant doctor` reports."""

import ast
import importlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyquant
from pyquant import doctor

ROOT = Path(__file__).resolve().parents[1]
HAS_EXTENSION = importlib.util.find_spec("pyquant._C") is not None


def test_version_is_the_installed_one():
    assert importlib.metadata.version("pyquant") == pyquant.__version__


def test_public_names():
    assert len(pyquant.__all__) <= 15
    assert set(pyquant.__all__) == {*pyquant._HOME, "__version__"}
    assert set(pyquant.__all__) <= set(dir(pyquant))
    with pytest.raises(AttributeError, match="no_such_name"):
        pyquant.no_such_name  # noqa: B018  (reading it is the test)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(pyquant.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == pyquant._HOME


@pytest.mark.parametrize("name", sorted(pyquant._HOME))
def test_public_name_resolves(name):
    home = pyquant._HOME[name]
    value = getattr(pyquant, name)
    assert value is getattr(importlib.import_module(home), name)


def test_import_is_light():
    code = "import sys, pyquant; print([m for m in ('torch', 'transformers', 'triton') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "[]"


def test_py_typed_is_installed():
    assert Path(pyquant.__file__).with_name("py.typed").is_file()


@pytest.mark.skipif(not HAS_EXTENSION, reason="the extension is not built")
def test_build_info():
    from pyquant import _C

    info = _C.build_info()
    assert set(info) == {"cuda", "archs", "flags"}
    assert int(info["cuda"].split(".")[0]) >= 12
    assert all(arch.endswith(("-real", "-virtual")) for arch in info["archs"].split())
    assert "fast_math" not in info["flags"]  # division must round as IEEE says, or codes differ from the reference


@pytest.mark.skipif(not HAS_EXTENSION, reason="the extension is not built")
def test_device_code_of_a_device_that_is_not_there():
    from pyquant import _C

    with pytest.raises(RuntimeError):
        _C.device_code(10_000)


@pytest.mark.gpu
@pytest.mark.small
def test_device_code():
    import torch

    from pyquant import _C

    major, _ = torch.cuda.get_device_capability()
    assert _C.device_code(0)["binary"] // 10 == major


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_report():
    facts = doctor.report()
    assert set(facts) == {"pyquant", "python", "platform", "packages", "gpu", "extension", "ops"}
    assert facts["packages"]["torch"] == importlib.metadata.version("torch")
    assert facts["extension"]["status"] in {"ready", "idle", "unusable", "absent"}
    assert (facts["extension"]["status"] == "absent") == (not HAS_EXTENSION)
    assert facts["gpu"]["why"]
    assert facts["extension"]["why"]
    assert all(set(row) == {"op", "device", "backend", "why"} for row in facts["ops"])


def test_doctor_text():
    facts = doctor.report()
    facts["packages"]["gptqmodel"] = None
    facts["ops"] = [{"op": "linear_w4a16", "device": "cpu", "backend": "torch", "why": "the only one for the CPU"}]
    text = doctor.format(facts)
    for wanted in (pyquant.__version__, "not installed", "CUDA extension", "linear_w4a16", "the only one for the CPU"):
        assert wanted in text


def test_doctor_without_the_extension(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    facts = doctor.report()
    assert facts["extension"]["status"] == "absent"
    assert "nvcc" in doctor.format(facts)


def test_doctor_with_a_broken_extension(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: planted")

    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "import_module", broken)
    found = doctor._extension({"available": False, "devices": []})
    assert found["status"] == "unusable"
    assert "planted" in found["why"]


def test_doctor_imports_nothing_heavy():
    code = "import sys; from pyquant import doctor; doctor.report(); print('transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.strip() == "False"


@pytest.mark.parametrize("source", ["linear_wgmma_bf16", "sample", "norm"])
def test_later_gpus_can_assemble_what_hopper_has_of_its_own(source, tmp_path):
    """A plain build carries PTX for Blackwell that nothing assembles before it is loaded there: one instruction of sm_90a
    alone would take the whole module with it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    if "sm_100" not in known:
        pytest.skip("this nvcc does not know sm_100")
    done = subprocess.run(
        [nvcc, "-std=c++17", "-gencode=arch=compute_100,code=sm_100", "-c", f"csrc/{source}.cu", "-o", tmp_path / "x.o"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
