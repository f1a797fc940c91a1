"""The table of ops and of the backends that can run them.

An op has one schema, one shape function ("fake"), at most one gradient, and up to three backends tried in this order:

* ``cuda``    the compiled extension ``pyquant._C``, for tensors on an NVIDIA GPU;
* ``triton``  ``pyquant.kernels``, for tensors on a GPU that the extension does not serve;
* ``torch``   ``pyquant.reference``, everywhere.

A backend declines a call by returning a reason from its ``declines`` function, and the next one is asked. The environment
variable ``PYQUANT_BACKEND`` (``cuda``, ``triton`` or ``torch``) pins one backend; a pinned backend that declines is an error.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("pyquant", "DEF")
BACKENDS = ("cuda", "triton", "torch")


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: ``run`` takes the op's arguments, ``declines`` says why it cannot (or returns None)."""

    run: Callable[..., Any]
    declines: Callable[..., str | None] = lambda *args: None


@dataclass
class Op:
    """An op of the table; ``call`` picks the backend and runs it."""

    name: str
    backends: dict[str, Backend]
    overload: Any = None
    notes: dict[str, str] = field(default_factory=dict)

    def call(self, *args: Any) -> Any:
        """Run on the first backend that takes these arguments.

        Raises:
            RuntimeError: when ``PYQUANT_BACKEND`` pins a backend that declines.
        """
        device = next(a for a in args if isinstance(a, Tensor)).device
        pinned = os.environ.get("PYQUANT_BACKEND")
        for name in (pinned,) if pinned else BACKENDS:
            backend = self.backends.get(name)
            why = unavailable(name, device.type) if backend else f"{self.name} has no backend {name!r}"
            why = why or backend.declines(*args)
            if why is None:
                if device.type == "cuda" and device.index != torch.cuda.current_device():
                    with torch.cuda.device(device):
                        return backend.run(*args)
                return backend.run(*args)
            if pinned:
                raise RuntimeError(f"PYQUANT_BACKEND={pinned} cannot run {self.name} on {device.type}: {why}")
        raise AssertionError(f"{self.name} has no torch backend")


OPS: dict[str, Op] = {}


def define(
    schema: str,
    fake: Callable[..., Any],
    backends: dict[str, Backend],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Op:
    """Enter an op into the table and register it with torch as ``torch.ops.pyquant.<name>``.

    Args:
        schema: torch schema text, ``"name(Tensor x, ...) -> Tensor"``.
        fake: checks the arguments and returns empty outputs of the right shape and dtype.
        backends: name -> :class:`Backend`; ``torch`` is required.
        backward, setup_context: as for ``torch.library.register_autograd``.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    op = OPS[name] = Op(name, backends)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, op.call, key)
    torch.library.register_fake(f"pyquant::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"pyquant::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    op.overload = getattr(torch.ops.pyquant, name).default
    return op


def needs_torch(*tensors: Tensor | None) -> bool:
    """True when a call must go through torch's dispatcher: tracing, subclass tensors, or a gradient is wanted."""
    if torch.compiler.is_compiling():
        return True
    grad = torch.is_grad_enabled()
    return any(
        t is not None and (type(t) not in (Tensor, torch.nn.Parameter) or (grad and t.requires_grad)) for t in tensors
    )


# ------------------------------------------------------------------------------------------------ availability


@functools.cache
def extension() -> Any:
    """The compiled module ``pyquant._C``, or the ImportError that says why it is absent."""
    try:
        return importlib.import_module("pyquant._C")
    except ImportError as error:
        return error


@functools.cache
def kernels(family: str) -> Any:
    """The Triton module ``pyquant.kernels.<family>``; call only when :func:`unavailable` said None."""
    return importlib.import_module(f"pyquant.kernels.{family}")


@functools.cache
def unavailable(backend: str, device: str) -> str | None:
    """Why no op can run on this backend with tensors on this kind of device, or None."""
    if backend == "torch":
        return None
    if backend == "cuda":
        if device != "cuda":
            return "the extension serves GPU tensors"
        if torch.version.hip:
            return "the extension is for NVIDIA GPUs"
        if isinstance(extension(), ImportError):
            return f"the extension is not built or does not load ({extension()})"
        capability = torch.cuda.get_device_capability()
        return (
            None if capability >= (8, 0) else f"the extension needs compute capability 8.0, this GPU has {capability}"
        )
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton serves GPU tensors (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
        return None
    raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")


def describe() -> list[dict[str, str]]:
    """Which backend serves which op on which device, and why: rows of {op, device, backend, why}."""
    rows = []
    for op in OPS.values():
        for device in ("cpu", "cuda"):
            if device == "cuda" and not torch.cuda.is_available():
                rows.append({"op": op.name, "device": device, "backend": "-", "why": "no GPU is visible to torch"})
                continue
            reasons = []
            for name in BACKENDS:
                why = unavailable(name, device) if name in op.backends else "not written"
                if why is None:
                    rows.append({"op": op.name, "device": device, "backend": name, "why": "; ".join(reasons)})
                    break
                reasons.append(f"{name}: {why}")
    return rows
