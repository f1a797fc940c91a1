"""``pyquant generate``: continue a prompt, or a conversation whose system prompt is kept in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pyquant.cli import Device, Dtype, command
from pyquant.cli_output import Progress

_CHAT = "Conversations (--chat)"
_CACHE = "KV cache"


@command
def generate(
    model: Annotated[str, typer.Argument(help="Folder of a full-precision or quantized model.")],
    prompt: Annotated[str | None, typer.Argument(help="What to continue, or the one turn of a --chat.")] = None,
    prompt_option: Annotated[str | None, typer.Option("--prompt", "-p", help="The same as a flag.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", min=1, help="64, or 256 for each turn of a --chat.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.8,
    seed: Annotated[int, typer.Option()] = 0,
    kv_bits: Annotated[
        int | None, typer.Option(help="Of cached keys and values: 8, 4, 3 or 2; 16 keeps all.", rich_help_panel=_CACHE)
    ] = None,
    kv_prompt: Annotated[
        str | None,
        typer.Option(
            help="First tokens kept in 16 bits: N, all (of the prompt) or none, 128 by default; system (that prompt) in a "
            "--chat that has one.",
            rich_help_panel=_CACHE,
        ),
    ] = None,
    kv_window: Annotated[int, typer.Option(help="Newest tokens kept in 16 bits.", rich_help_panel=_CACHE)] = 128,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Turns from standard input, a line each, until Ctrl-D.", rich_help_panel=_CHAT),
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system-prompt", "--system", help="What comes first.", rich_help_panel=_CHAT)
    ] = None,
    system_file: Annotated[
        Path | None,
        typer.Option("--system-prompt-file", "--system-file", help="A file that holds it.", rich_help_panel=_CHAT),
    ] = None,
    cache_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-cache",
            "--kv-file",
            help="Keys and values of the system prompt (.safetensors): read if it is there, else written.",
            rich_help_panel=_CHAT,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Continue a prompt, or talk; a quantized model runs on pyquant's kernels."""
    if prompt is not None and prompt_option is not None:
        raise ValueError(f"two prompts are given, {prompt!r} and --prompt {prompt_option!r}")
    prompt = prompt_option if prompt is None else prompt
    given = {"--system-prompt": system, "--system-prompt-file": system_file, "--prompt-cache": cache_file}
    if not chat and (wrong := [name for name, value in given.items() if value is not None]):
        raise ValueError(f"{' and '.join(wrong)} needs --chat")
    if chat:
        talk(
            model,
            prompt,
            given,
            max_new_tokens or 256,
            temperature,
            seed,
            (kv_bits, kv_prompt, kv_window),
            device,
            dtype,
        )
        return
    if prompt is None:
        raise ValueError("give a prompt to continue, or --chat")
    from pyquant.integrations.commands import generate as run
    from pyquant.integrations.commands import kv_settings, load_any, token_streamer
    from pyquant.integrations.inference import prepare_for_inference

    kept = None if kv_bits is None else kv_settings(kv_bits, kv_prompt or "128", kv_window)
    with Progress():
        loaded, tokenizer, _ = load_any(model, device, dtype)
    if loaded.device.type == "cuda":
        how = {"kv_bits": kept.bits, "kv_prompt_tokens": kept.prompt_tokens, "kv_window": kept.window} if kept else {}
        prepare_for_inference(loaded, **how)
        kept = None if "generate" in vars(loaded) else kept  # the captured step keeps its own cache
    streamer = token_streamer(tokenizer) if sys.stdout.isatty() else None
    text = run(loaded, tokenizer, prompt, max_new_tokens or 64, temperature, seed, streamer, kept)
    if streamer is None:
        typer.echo(text)


def talk(
    model: str,
    prompt: str | None,
    given: dict[str, Any],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    kv: tuple[int | None, str | None, int],
    device: str,
    dtype: str,
) -> None:
    """A conversation: one turn where there is a prompt, else a line of standard input each."""
    from pyquant.integrations import chat
    from pyquant.integrations.commands import kv_settings, load_any, sampling

    system, file, cache_file = given.values()
    if system is not None and file is not None:
        raise ValueError(f"--system-prompt and --system-prompt-file {file} are both given")
    if file is not None:
        system = file.read_text(encoding="utf-8").strip()
    bits, kept, window = kv
    has_system = bool(system) or cache_file is not None
    if kept not in (None, "system") and has_system:
        raise ValueError(f"--kv-prompt {kept} does not go with a system prompt, which is kept whole (system)")
    settings = kv_settings(bits or 16, kept or ("system" if has_system else "128"), window, has_system)
    how = sampling(temperature)
    with Progress():
        loaded, tokenizer, _ = load_any(model, device, dtype)
    conversation = chat.start(loaded, tokenizer, system, settings, cache_file)
    streamed = sys.stdout.isatty()
    turns = [prompt] if prompt is not None else lines()
    for said in chat.answers(conversation, turns, streamed, seed, max_new_tokens=max_new_tokens, how=how):
        if not streamed:
            typer.echo(said)


def lines() -> Iterator[str]:
    """Lines of standard input until its end, asked for on a terminal."""
    asked = sys.stdin.isatty()
    while True:
        if asked:
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            if asked:
                typer.echo("", err=True)
            return
        yield line
