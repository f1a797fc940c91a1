"""What is installed, which GPU is found, and which backend serves each op: the facts behind ``pyquant doctor``.

Versions are read from package metadata, so looking for an optional package does not import it.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

import pyquant
from pyquant.ops._registry import describe

PACKAGES = ("torch", "transformers", "triton", "compressed-tensors", "gptqmodel")


def report() -> dict[str, Any]:
    """Collect everything :func:`format` prints.

    Keys: ``pyquant`` and ``python`` (versions), ``platform``, ``packages`` (name -> version, None where absent),
    ``gpu``, ``extension`` and ``ops`` (a list of ``{op, device, backend, why}``).
    """
    gpu = _gpu()
    return {
        "pyquant": pyquant.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpu": gpu,
        "extension": _extension(gpu),
        "ops": describe(),
    }


def format(facts: dict[str, Any]) -> str:
    """The report as text for a terminal, one fact per line."""
    lines = [f"pyquant {facts['pyquant']}, Python {facts['python']}, {facts['platform']}", "", "packages"]
    lines += [f"  {name:<20} {version or 'not installed'}" for name, version in facts["packages"].items()]

    gpu = facts["gpu"]
    driver = f" (driver {gpu['driver']})" if gpu["driver"] else ""
    lines += ["", f"GPU: {gpu['why']}{driver}"]
    lines += [
        f"  cuda:{device['index']:<15} {device['name']}, compute capability {device['capability']}, "
        f"{device['memory_gib']:.0f} GiB"
        for device in gpu["devices"]
    ]

    extension = facts["extension"]
    lines += ["", f"CUDA extension: {extension['status']}: {extension['why']}"]
    lines += [f"  {key:<20} {value}" for key, value in extension["build"].items()]

    lines += ["", "ops"]
    width = max((len(row["op"]) for row in facts["ops"]), default=0)
    lines += [f"  {row['op']:<{width}}  {row['device']:<5} {row['backend']:<10} {row['why']}" for row in facts["ops"]]
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    """Devices as torch sees them, and the reason where it sees none."""
    found: dict[str, Any] = {"available": torch.cuda.is_available(), "why": "", "driver": None, "devices": []}
    if torch.version.cuda is None and torch.version.hip is None:
        found["why"] = "none usable: this build of torch is for the CPU only"
        return found
    if not found["available"]:
        found["why"] = "none usable: torch finds no GPU, or no driver new enough for it"
        return found
    found["driver"] = _driver()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found["devices"].append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": properties.total_memory / 2**30,
            }
        )
    found["why"] = f"{len(found['devices'])} found"
    return found


def _driver() -> str | None:
    """Version of the NVIDIA driver, as its own tool tells it; torch has no public name for it."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def _extension(gpu: dict[str, Any]) -> dict[str, Any]:
    """State of ``pyquant._C``: ``ready``, ``idle`` (no GPU to run on), ``unusable`` or ``absent``."""
    if find_spec("pyquant._C") is None:
        why = "not built; install again with nvcc on PATH and PYQUANT_SKIP_CUDA unset"
        return {"status": "absent", "why": why, "build": {}}
    try:
        extension = import_module("pyquant._C")
        build = dict(extension.build_info())
    except Exception as error:  # whatever it is, it is the answer to "why not"
        return {"status": "unusable", "why": f"it does not import: {error}", "build": {}}
    if torch.version.hip is not None:
        return {"status": "unusable", "why": "it holds NVIDIA code and this torch is for ROCm", "build": build}
    if not gpu["available"]:
        return {"status": "idle", "why": "built, but there is no GPU to run it on", "build": build}
    try:
        for device in gpu["devices"]:
            extension.device_code(device["index"])
    except Exception as error:
        why = f"cuda:{device['index']} (compute capability {device['capability']}): {error}"
        return {"status": "unusable", "why": why, "build": build}
    return {"status": "ready", "why": "it holds code for every GPU here", "build": build}
