"""Source files of csrc/ as a library of the CPU: ``tests/emulated`` stands in for CUDA, where a thread is a fiber."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

EMULATED = Path(__file__).parent / "emulated"
DYNAMIC = "    extern __shared__ __align__(16) unsigned char memory[];\n"  # is a variable of the emulation


def emulated_library(folder: Path, sources: dict[str, str], entries: list[str]) -> ctypes.CDLL:
    """``entries``, files of ``tests/emulated``, compiled with ``sources``: file name in csrc/ -> text; .cu becomes .cuh.

    Skips the test where no compiler knows C++20 and ``_Float16``.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    probe = subprocess.run([compiler, "-std=c++20", "-xc++", "-fsyntax-only", "-"], input="_Float16 x;", text=True,
                           capture_output=True)  # fmt: skip
    if probe.returncode:
        pytest.skip(f"{compiler} does not know C++20 with _Float16")
    for file in EMULATED.iterdir():
        shutil.copy(file, folder)
    for name, text in sources.items():
        (folder / (name + "h" if name.endswith(".cu") else name)).write_text(text)
    (folder / "cuda_runtime.h").write_text('#include "cuda.h"\n')
    (folder / "programmatic.cuh").write_text("")
    command = [compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", f"-I{folder}"]
    command += [*(str(folder / entry) for entry in entries), "-o", str(folder / "emulated.so")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return ctypes.CDLL(str(folder / "emulated.so"))
