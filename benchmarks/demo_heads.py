"""`make demo-heads`: trains the exit heads that the demo ships (dyndepth/demo/heads); hours on two cores, and it resumes.

The corpus is what the model answers to prompts it writes itself; no text from elsewhere is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import dyndepth
from dyndepth.demo.weights import HEADS, load_model
from dyndepth.training import TrainConfig

CONFIG = TrainConfig(
    exits=(20, 23, 25), corpus=480_000, own=1.0, new_tokens=160, decode=128, tokens=600_000, lr=1e-3, evaluate_every=20,
    checkpoint_every=20, evaluate_rows=6000,
)  # fmt: skip


def main(folder: Path) -> None:
    model, tokenizer = load_model()
    dyndepth.train(model, (), tokenizer, output=folder, config=CONFIG).save_pretrained(HEADS)
    print(f"wrote {HEADS}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo-heads"))
