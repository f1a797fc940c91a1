"""``pyquant plan``: which model is meant, and the plans of :mod:`pyquant.recipes.plan` as rows of a table."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyquant.integrations.checkpoint import read_config
from pyquant.recipes.plan import RECIPES, Plan, Work, plan
from pyquant.recipes.plan_constants import CONSTANTS
from pyquant.recipes.shapes import Shape, read_shape

SHAPES = Path(__file__).with_name("shapes")
STEPS = {"kd-qat": 1000, "soft-qat": 1000, "blockwise": 200, "bisup": 320, "serve": 256}  # the recipes' defaults
HEAD = ["recipe", "GPUs", "GB a GPU", "GB a host", "time", "for", "settings and notes"]


def known() -> list[str]:
    """Names of the shapes that come along."""
    return sorted(file.stem for file in SHAPES.glob("*.json"))


def load_shape(model: str) -> Shape:
    """The shape of a model folder, of a ``config.json``, of one of :func:`known`, or of a name on the Hugging Face Hub, of
    which nothing but its ``config.json`` is fetched.

    Raises:
        FileNotFoundError: none of these.
        ValueError: a config that describes no decoder of equal blocks.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return read_shape(read_config(path))
    if path.is_file():
        try:
            return read_shape(json.loads(path.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
    if model.lower() in known():
        return read_shape(json.loads((SHAPES / f"{model.lower()}.json").read_text(encoding="utf-8")))
    choices = f"a folder with config.json, such a file, a name on the Hub, or one of {', '.join(known())}"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise FileNotFoundError(f"{model} is no model: give {choices}")
    from huggingface_hub import hf_hub_download

    try:
        return read_shape(read_config(Path(hf_hub_download(model, "config.json")).parent))
    except Exception as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{model}: the Hugging Face Hub does not give its config.json ({why}); give {choices}"
        ) from None


def plans(
    shape: Shape, recipes: Sequence[str], gpus: Sequence[int], work: Work, steps: int | None = None
) -> list[Plan]:
    """A plan for each recipe and number of GPUs; ``steps`` None is each recipe's default, and a batch smaller than the number
    of GPUs becomes one window on each.

    Raises:
        ValueError: as :func:`pyquant.recipes.plan.plan`.
    """
    found = []
    for recipe in recipes or RECIPES:
        for count in gpus:
            own = replace(work, gpus=count, batch=max(work.batch, count))
            own = replace(own, steps=STEPS.get(recipe, 1) if steps is None else steps)
            found.append(plan(shape, recipe, own))
    return found


def cells(made: Plan) -> list[str]:
    """A row under :data:`HEAD`."""
    chosen = ", ".join(f"{name}={setting}" for name, setting in made.settings.items())
    said = "; ".join(filter(None, [chosen, *made.notes]))
    sizes = [f"{size / 1e9:.1f}" if size < 1e11 else f"{size / 1e9:.0f}" for size in (made.device, made.host)]
    return [made.recipe, str(made.gpus), *sizes, duration(made.seconds), made.unit, said]


def duration(seconds: float) -> str:
    """In the unit that a person would use."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def to_dict(made: Plan) -> dict[str, Any]:
    """JSON-ready: bytes by what needs them, seconds, settings, notes."""
    need = {"device": made.need.device, "host": made.need.host, "disk": made.need.disk}
    return {
        "recipe": made.recipe, "gpus": made.gpus, "device_bytes": made.device, "host_bytes": made.host, "parts": need,
        "seconds": made.seconds, "for": made.unit, "settings": made.settings, "notes": made.notes,
    }  # fmt: skip


def constants() -> list[list[str]]:
    """Rows (name, value, unit, basis, source) of everything that plans rest on."""
    return [[name, f"{c.value:.4g}", c.unit, c.basis, c.source] for name, c in CONSTANTS.items()]
