"""Split computing in two processes on this machine: a small ViT on scikit-learn's digits, with exits, cut after layer 3.

    python docs/examples/split.py [--results docs/results/split.json]

Trains the ViT and its exits (a minute on two cores), saves both, starts a second process that serves layers 3 to 6 over
torch.distributed, and sends the held-out digits in batches of 32 in every precision.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from sklearn.datasets import load_digits

import dyndepth
from dyndepth.encoders import LinearHead, SampleExit, SampleExits, facts_of
from dyndepth.exits import TopProbability
from dyndepth.split import WIRES, GlooLink, SplitEncoder, SplitServer

LAYERS, WIDTH, BOUNDARY, THRESHOLD, BATCH, STEPS = 6, 64, 3, 0.9, 32, 400


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1797 pictures [1, 8, 8] in [-1, 1] and their digits, in a fixed order; the last 397 are held out."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    pictures = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return pictures[order], torch.tensor(data.target)[order]


def trained() -> tuple[Any, SampleExits]:
    """A ViT and linear exits after layers 1 to 5, trained together: the sum of all cross-entropies."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=128, image_size=8, patch_size=2,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    heads = torch.nn.ModuleList(LinearHead(WIDTH, 10, norm=True) for _ in range(LAYERS - 1))
    pictures, labels = (part[:1400] for part in digits())
    optimiser = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=1e-3, weight_decay=0.05)
    for _ in range(STEPS):
        rows = torch.randint(1400, (64,))
        out = model(pixel_values=pictures[rows], output_hidden_states=True)
        answers = [out.logits, *(h.out(h.norm(s[:, 0])) for h, s in zip(heads, out.hidden_states[1:], strict=False))]
        loss = sum(torch.nn.functional.cross_entropy(answer, labels[rows]) for answer in answers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    points = [SampleExit(at + 1, head, TopProbability(), THRESHOLD) for at, head in enumerate(heads)]
    return model, SampleExits(points, facts_of(model)).eval()


def loaded(folder: Path) -> dyndepth.DynamicEncoder:
    model = transformers.ViTForImageClassification.from_pretrained(folder / "model").eval()
    return dyndepth.DynamicEncoder(model, SampleExits.from_pretrained(folder / "exits"))


def serve(folder: Path, port: int) -> None:
    SplitServer(loaded(folder), BOUNDARY, GlooLink(1, port), idle=120.0).serve()


def measure(folder: Path) -> dict[str, Any]:
    """Accuracy, how often the answer is the one of a single process, and bytes, by precision."""
    encoder = loaded(folder)
    pictures, labels = (part[1400:] for part in digits())
    batches = list(zip(pictures.split(BATCH), labels.split(BATCH), strict=True))
    whole = [encoder(pixel_values=part) for part, _ in batches]
    alone = torch.cat([out.logits.argmax(1) for out in whole])
    depths = torch.cat([out.exit_layers for out in whole])
    # Port 0: the store listens on a port that is free, and the other process is told which.
    listening = socket.create_server(("127.0.0.1", 0))
    command = [sys.executable, __file__, "--serve", str(folder), "--port", str(listening.getsockname()[1])]
    found = []
    with subprocess.Popen(command) as worker, SplitEncoder(encoder, BOUNDARY, GlooLink(0, listening=listening)) as split:
        for wire in WIRES:
            split.wire, before = wire, split.total
            answers = torch.cat([split(pixel_values=part).logits for part, _ in batches]).argmax(1)
            found.append(
                {
                    "wire": wire,
                    "samples": split.total.samples - before.samples,
                    "sent_bytes": split.total.sent - before.sent,
                    "received_bytes": split.total.received - before.received,
                    "accuracy": float((answers == labels).float().mean()),
                    "same_answer": float((answers == alone).float().mean()),
                }
            )
        split.close()
        worker.wait(60)
    tokens = (8 // 2) ** 2 + 1
    return {
        "model": f"ViT, {LAYERS} layers of width {WIDTH}, {tokens} tokens",
        "samples": len(labels),
        "batch": BATCH,
        "boundary": BOUNDARY,
        "threshold": THRESHOLD,
        "accuracy_one_process": float((alone == labels).float().mean()),
        "left_before_split": float((depths <= BOUNDARY).float().mean()),
        "all_fp32_bytes": len(labels) * tokens * WIDTH * 4,
        "wires": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="write the figures here")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve, given.port)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, exits = trained()
        model.save_pretrained(folder / "model")
        exits.save_pretrained(folder / "exits")
        figures = measure(folder)
    print(json.dumps(figures, indent=1))
    if given.results is not None:
        given.results.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
