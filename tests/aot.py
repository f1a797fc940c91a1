"""Compile a Triton kernel for a GPU that is not here, and read what ptxas says of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Compiled:
    """What came out for one kernel and one target."""

    registers: int
    stack_bytes: int  # per thread; spilled registers live here
    shared_bytes: int
    ptx: str
    ttgir: str


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int, **options: int
) -> Compiled:
    """Compile ahead of time, as Triton would for aligned contiguous tensors.

    Args:
        kernel: a ``@triton.jit`` function.
        types: Triton type of each runtime argument (``"*bf16"``, ``"i32"``, ``"fp32"``); pointers, and integers named
            in ``constants["ALIGNED"]``, are taken to be multiples of 16.
        constants: value of every other argument; names that the kernel does not have are ignored.
        arch: 80, 90, ...
        options: ``num_warps``, ``num_stages``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in (*kernel.arg_names, "ALIGNED")}
    aligned = constants.pop("ALIGNED", ())
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in aligned
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return Compiled(*_resources(built.asm["cubin"]), built.metadata.shared, built.asm["ptx"], built.asm["ttgir"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])
