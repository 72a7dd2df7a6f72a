"""What commands share: the app, loading a checkpoint, prompts from files, errors in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from dyndepth import errors
from dyndepth.errors import ArgumentError

app = typer.Typer(
    help="Dynamic-depth batched inference.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

#: What a command says in one line: everything raised on purpose, and what the system or a missing package says.
ERRORS: tuple[type[Exception], ...] = (
    *(error for error in vars(errors).values() if isinstance(error, type)),
    OSError,
    ModuleNotFoundError,
)


def prompts_of(path: Path) -> list[str]:
    """Prompts of a file, empty lines left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError):
            raise ArgumentError(f"{path}: entry {number} must be a JSON object with a key `prompt`") from None
    return found


def load(name: str, dtype: str) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ArgumentError(f"model: there is no folder {name}")
    kind = dtype_of(dtype)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=kind)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArgumentError(f"model: {name} cannot be loaded: {' '.join(str(error).split())}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def dtype_of(name: str) -> Any:
    import torch

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise ArgumentError(f"dtype must be one of {', '.join(kinds)}, got {name!r}")
    return kinds[name]


def chat_of(tokenizer: Any, prompts: list[str], wanted: bool) -> list[str]:
    """The prompts, in the tokenizer's chat template if wanted."""
    from dyndepth.demo.weights import chat as templated

    if not wanted:
        return prompts
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError("--chat: this tokenizer has no chat template")
    return [templated(tokenizer, prompt) for prompt in prompts]
