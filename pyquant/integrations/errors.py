"""How the error of quantization grows: through the layers of a token, and from token to token.

After the two directions of BiSup (arXiv 2405.15346); what is measured is our reading. With h the hidden states of the last
token of a window after each block, the curves are ``|h_q - h| / |h|`` over all windows where

* ``total``: every token is quantized,
* ``vertical``: only the last token is, on the K and V that full precision computed of the others: its own rounding,
  piling up through depth,
* ``horizontal``: only the others are: the last token is computed in full precision on the K and V that the quantized model
  computed of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyquant.integrations.prompt import empty_cache
from pyquant.recipes.blocks import find_blocks
from pyquant.report import Panels, Report, panel_figure, save_figure, write_report

CURVES = ("total", "vertical", "horizontal")


@torch.inference_mode()
def error_curves(
    full: nn.Module,
    reference: nn.Module,
    model: nn.Module,
    windows: Tensor,
    kv_bits: int = 16,
    group_size: int = 128,
    rotated: bool = False,
    batch_size: int = 4,
) -> dict[str, list[float]]:
    """The three curves, a value after each block.

    Args:
        full: the full-precision model.
        reference: the same in the basis of the quantized model (its rotated copy, else ``full``).
        model: the quantized one.
        windows: int64 ``[n, T]``, T at least 2.
        kv_bits, group_size, rotated: of K and V of quantized tokens, see :mod:`pyquant.integrations.prompt`.
        batch_size: windows at once.

    Raises:
        ValueError: windows without a token before the last.
    """
    if windows.dim() != 2 or windows.shape[1] < 2:
        raise ValueError(f"windows must be [n, T >= 2] tokens, got {tuple(windows.shape)}")
    device = next(full.parameters()).device
    sums: dict[str, Tensor] = {}
    for start in range(0, len(windows), batch_size):
        tokens = windows[start : start + batch_size].to(device)
        head, last = tokens[:, :-1], tokens[:, -1:]

        def states(
            who: nn.Module, others: nn.Module, bits: int, own: int, head: Any = head, last: Any = last
        ) -> Tensor:
            """Of the last token ``[L, B, H]`` by ``who`` on K and V that ``others`` computed."""
            cache = empty_cache(full, bits, group_size, rotated)
            others(input_ids=head, past_key_values=cache, use_cache=True)
            for layer in cache.layers:
                layer.bits = own
            with last_states(who) as found:
                who(input_ids=last, past_key_values=cache, use_cache=True)
            return torch.stack(found).double()

        exact = {id(m): states(m, m, 16, 16) for m in {id(full): full, id(reference): reference}.values()}
        for name, who, others, bits, own, against in (
            ("total", model, model, kv_bits, kv_bits, reference),
            ("vertical", model, reference, 16, kv_bits, reference),
            ("horizontal", full, model, kv_bits, 16, full),
        ):
            wanted = exact[id(against)]
            parts = [(states(who, others, bits, own) - wanted).square(), wanted.square()]
            found = torch.stack([part.sum((1, 2)) for part in parts])
            sums[name] = sums.get(name, torch.zeros_like(found)) + found
    return {name: (s[0] / s[1]).sqrt().tolist() for name, s in sums.items()}


@contextmanager
def last_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """While active, collects the last token's hidden states ``[B, H]`` after each block."""
    found: list[Tensor] = []

    def see(module: nn.Module, args: Any, out: Any) -> None:
        found.append((out[0] if isinstance(out, tuple) else out)[:, -1])

    hooks = [block.register_forward_hook(see) for block in find_blocks(model)[1]]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def write_error_pages(
    curves: Mapping[str, Mapping[str, list[float]]], out: Path, title: str, facts: Mapping[str, Any], command: str = ""
) -> list[str]:
    """``errors.json``, ``errors.svg`` and ``report.html`` of the curves of several models; the names of what was written.

    Args:
        curves: model -> curve -> values.
        out: an existing folder.
        title: of the model.
        facts: settings, for the page.
        command: the command line.
    """
    panels = {
        name: {who: (list(range(1, len(found[name]) + 1)), found[name]) for who, found in curves.items()}
        for name in CURVES
    }
    caption = (
        "Relative error of the last token's hidden states after each block: every token quantized, only the last one, only "
        "the others."
    )
    picture = Panels("Error by depth", caption, "block", "relative error", panels)
    (out / "errors.json").write_text(json.dumps({"facts": dict(facts), "curves": curves}, indent=1) + "\n")
    save_figure(panel_figure(picture), out / "errors.svg")
    columns, rows = error_table(curves)
    report = Report(
        title=f"Errors of {title}", columns=columns, rows=rows, heading="After the last block", pictures=[picture],
        config=facts, versions={"torch": torch.__version__}, command=command,
    )  # fmt: skip
    write_report(report, out / "report.html")
    return ["errors.json", "errors.svg", "report.html"]


def error_table(curves: Mapping[str, Mapping[str, list[float]]]) -> tuple[list[str], list[list[str]]]:
    """A line a model: the errors after the last block."""
    return ["model", *CURVES], [[who, *(f"{found[n][-1]:.4f}" for n in CURVES)] for who, found in curves.items()]
