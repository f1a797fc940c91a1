"""The architecture as a test: imports go down, optional packages stay in their folder, files stay readable."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each part of the package may import from the others. A new folder or module needs a line here.
ALLOWED: dict[str, set[str]] = {
    "formats": set(),
    "report": set(),
    "kernels": {"formats"},
    "reference": {"formats"},
    "ops": {"formats", "reference", "kernels", "_C"},
    "doctor": {"ops", "_C"},
    "quantizers": {"formats", "reference", "ops"},
    "nn": {"formats", "reference", "ops", "quantizers"},
    "analysis": {"formats", "reference", "ops", "quantizers", "nn"},
    "recipes": {"formats", "reference", "ops", "quantizers", "nn", "analysis"},
    "integrations": {"formats", "reference", "ops", "quantizers", "nn", "analysis", "recipes", "report"},
}
TOP = {
    "cli",
    "cli_output",
    "cli_ablate",
    "cli_analyze",
    "cli_eval",
    "cli_generate",
    "cli_plan",
    "demo",
    "__main__",
}  # these may import everything below them

# Each optional or heavy package is imported by one part alone; everything else works where it is missing.
OWNER = {
    "transformers": {"integrations"},
    "datasets": {"integrations"},
    "lm_eval": {"integrations"},
    "accelerate": {"integrations"},
    "huggingface_hub": {"integrations"},
    "compressed_tensors": {"integrations"},
    "gptqmodel": {"integrations"},
    "vllm": {"integrations"},
    "triton": {"kernels"},
    "matplotlib": {"report"},
    "typer": {"cli", "cli_output", "cli_ablate", "cli_analyze", "cli_eval", "cli_generate", "cli_plan"},
}

LINES = {".py": 500, ".cu": 900, ".cuh": 900, ".cpp": 900, ".h": 900}


def sources() -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Every Python file of the package with its dotted name as a tuple."""
    for path in sorted([*(ROOT / "pyquant").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ("pyquant", *parts) if parts[0] == "kernels" else parts
        yield path, name


def imported(code: str, name: tuple[str, ...]) -> Iterator[str]:
    """Absolute dotted names that ``code`` imports at any depth; ``from a import b`` gives ``a.b``."""
    package = name[:-1]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def violations(code: str, name: tuple[str, ...]) -> list[str]:
    """Sentences about the imports of one module that break the rules."""
    label = ".".join(name)
    part = name[1]
    if part == "__init__":  # pyquant/__init__.py names what is below, lazily
        return []
    if part not in ALLOWED and part not in TOP:
        return [f"{label}: say in tests/test_layering.py what pyquant.{part} may import"]
    wrong = []
    for target in imported(code, name):
        head, *rest = target.split(".")
        if head in OWNER and part not in OWNER[head]:
            wrong.append(f"{label}: {head} is imported by {' and '.join(sorted(OWNER[head]))} alone")
        if head == "kernels":
            wrong.append(f"{label}: write pyquant.kernels, `kernels` is another package")
        if head == "pyquant" and rest and part in ALLOWED:
            known = rest[0] in ALLOWED or rest[0] in TOP or rest[0] == "_C"
            if known and rest[0] not in ALLOWED[part] | {part}:
                wrong.append(f"{label}: {part} may not import {rest[0]}")
    return wrong


def test_imports_go_down():
    wrong = [sentence for path, name in sources() for sentence in violations(path.read_text(), name)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("pyquant.recipes.rtn", "import transformers"),
        ("pyquant.recipes.rtn", "def f():\n    from transformers.models import llama"),
        ("pyquant.recipes.rtn", "from pyquant.integrations import export"),
        ("pyquant.recipes.rtn", "from ..integrations import export"),
        ("pyquant.reference", "from . import ops"),
        ("pyquant.formats.int4", "from pyquant import nn"),
        ("pyquant.nn.__init__", "from ..recipes import rtn"),
        ("pyquant.quantizers.lsq", "from pyquant.nn.linear import QLinear"),
        ("pyquant.ops.linear", "import kernels.linear"),
        ("pyquant.ops.linear", "import triton.language as tl"),
        ("pyquant.nn.linear", "from pyquant._C import build_info"),
        ("pyquant.surprise", "import json"),
    ],
)
def test_the_rules_reject(name, code):
    assert violations(code, tuple(name.split(".")))


def test_files_stay_readable():
    csrc = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in LINES]
    paths = [path for path, _ in sources()] + csrc
    counts = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in paths}
    long = {path: count for path, count in counts.items() if count > LINES[Path(path).suffix]}
    assert not long, f"split these: {long}"


def test_no_torch_header_in_csrc():
    header = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10)/', re.MULTILINE)
    assert header.search("  # include <ATen/cuda/CUDAContext.h>\n")
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert files
    assert [path.name for path in files if header.search(path.read_text())] == []


# ---- kernels/ and the PyPI package of the same name ------------------------------------------------------------------


def python_in_root(code: str, *options: str, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess:
    """Run code by `python -c` from the repository root, which is then first on sys.path, before `path` and the rest."""
    code = f"import sys; sys.path[1:1] = {[str(entry) for entry in path]!r}\n{code}"
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def theirs(tmp_path):
    """A stand-in for the package on PyPI, in a folder that comes after the repository root on sys.path."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from .hub import get_kernel\n__version__ = '9.9'\n")
    (package / "hub.py").write_text("def get_kernel(): return 'theirs'\n")
    return tmp_path


def test_pyquant_kernels_is_installed():
    # A checkout alone has no pyquant.kernels: the folder gets that name by being installed.
    assert importlib.util.find_spec("pyquant.kernels") is not None, "run `pip install -e .` (or `make venv`) first"


def test_kernels_stands_aside(theirs):
    ran = python_in_root(
        "from kernels import get_kernel; import kernels, kernels.hub, pyquant.kernels\n"
        "assert get_kernel() == 'theirs' and kernels.__version__ == '9.9'\n"
        "assert pyquant.kernels.__name__ == 'pyquant.kernels' and not hasattr(pyquant.kernels, 'get_kernel')",
        path=(theirs,),
    )
    assert ran.returncode == 0, ran.stderr


def test_kernels_is_empty_where_there_is_no_other():
    # An ordinary ImportError for who wants a name, a version for who only asks (raising made transformers crash).
    # -S leaves out site-packages, and with it the real package where it is installed.
    ran = python_in_root("import kernels; assert kernels.__version__ == '0'", "-S")
    assert ran.returncode == 0, ran.stderr
    for wanted in ("from kernels import get_kernel", "import kernels.linear"):
        ran = python_in_root(wanted, "-S")
        assert ran.returncode != 0
        assert "ImportError" in ran.stderr or "ModuleNotFoundError" in ran.stderr


def test_an_error_of_theirs_is_not_hidden(tmp_path):
    (tmp_path / "kernels.py").write_text("raise RuntimeError('theirs is broken')\n")
    ran = python_in_root("import kernels", path=(tmp_path,))
    assert "theirs is broken" in ran.stderr
