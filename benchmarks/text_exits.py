"""`make text-exits`: the exits that the text demo ships; a few minutes. Heads only: MiniLM stays as published.

A norm and a linear per layer on the mean of a document's tokens, trained together on Reuters R52's training set without the
held-out documents (DeeBERT's second stage: the model is frozen). Of those, some stop training early and the others certify the
thresholds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dyndepth.calibration import calibrate_samples
from dyndepth.demo.tasks import reuters
from dyndepth.encoders import SampleExits
from dyndepth.exits import TopProbability
from dyndepth.recipes.sample_heads import linear_exits
from dyndepth.training.encoder_losses import unweighted
from dyndepth.training.encoder_trainer import EncoderConfig, train_encoder

#: At most this share of documents gets another answer than at full depth, with this confidence.
RISK, CONFIDENCE = 0.05, 0.95
#: Held-out documents that stop training early; the others set thresholds.
_STOPPING, _BATCH = 300, 50


def main(folder: Path) -> None:
    data = reuters.documents()
    model, tokenizer = reuters.minilm()
    train, held = (reuters.encoded(tokenizer, split.texts) for split in (data.train, data.held_out))
    stopping = {name: value[:_STOPPING] for name, value in held.items()}, data.held_out.labels[:_STOPPING]
    torch.manual_seed(0)
    exits = linear_exits(
        model, len(data.topics), lambda _: TopProbability(), float("inf"), "text demo", pooling="mean", norm=True
    )
    config = EncoderConfig(updates=3000, batch=64, lr=3e-3, precision="bf16", evaluate_every=100, patience=6)
    done = train_encoder(model, exits, train, data.train.labels, unweighted, config=config, validation=stopping)
    rows = torch.arange(_STOPPING, len(data.held_out)).split(_BATCH)
    batches = [{name: value[at] for name, value in held.items()} for at in rows]
    exits = calibrate_samples(model, done.exits, batches, risk=RISK, confidence=CONFIDENCE)
    record = {
        **exits.record, "data": "Reuters R52", "topics": data.topics, "tokens": reuters.LENGTH, "updates": done.best_update,
        "method": "heads on the frozen model, sum of cross-entropies",
    }  # fmt: skip
    SampleExits(exits, exits.model, final=exits.final, record=record).save_pretrained(folder)
    print(record["certificate"])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else reuters.EXITS)
