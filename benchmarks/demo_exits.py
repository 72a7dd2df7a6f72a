"""`make demo-exits`: makes the exits that the demo ships (dyndepth/demo/exits); hours on two cores, and it resumes.

1. The model answers prompts that it writes itself; no text from elsewhere is needed.
2. Heads are trained on six documents of eight (dyndepth.train).
3. Maps, routers and thresholds are fitted on documents that no gradient saw (dyndepth.fit).
"""

from __future__ import annotations

import sys
from pathlib import Path

import dyndepth
from dyndepth.data import TEST, TUNE, Corpus, deal
from dyndepth.demo.weights import EXITS, load_model
from dyndepth.training import TrainConfig
from dyndepth.training.run import CORPUS

CONFIG = TrainConfig(
    exits=(20, 23, 25, 27, 28), corpus=480_000, own=1.0, new_tokens=160, decode=128, tokens=600_000, lr=1e-3,
    evaluate_every=20, checkpoint_every=20, evaluate_rows=6000,
)  # fmt: skip


def main(folder: Path) -> None:
    model, tokenizer = load_model()
    heads = dyndepth.train(model, (), tokenizer, output=folder, config=CONFIG)
    corpus = Corpus.load(folder / CORPUS)
    unseen = deal([*corpus.of(TUNE), *corpus.of(TEST)], [], model.config.hidden_size, CONFIG.seed)
    spans = [(leave, model.config.num_hidden_layers) for leave in CONFIG.exits]
    dyndepth.fit(model, unseen, heads=heads, candidates=spans).save_pretrained(EXITS)
    print(f"wrote {EXITS}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo-exits"))
