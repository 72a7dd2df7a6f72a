"""MuE on pictures and questions: thresholds per stream and in the decoder against accuracy and work.

    python benchmarks/mue.py BUILD_FOLDER [--results docs/results/mue.json]

scikit-learn's digits with questions in words ("plus four", "more than six", "even", "which digit") and answers of one or two
words. A ViT, a BERT and a BERT decoder are trained together under the paper's loss (the sum over decoder layers); a trained
system in BUILD_FOLDER is used again. Thresholds are chosen on one half of the held-out pictures and measured on the other.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from sklearn.datasets import load_digits
from torch import Tensor

from dyndepth import info
from dyndepth.files import replacing
from dyndepth.recipes import mue

WORDS = (
    "<pad>", "<start>", "<end>", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "which",
    "digit", "plus", "even", "more", "than", "yes", "no",
)  # fmt: skip
NUMBER = {word: at for at, word in enumerate(WORDS)}
DIGITS = WORDS[3:13]
LAYERS, WIDTH, TRAINED, STEPS, BATCH = 6, 64, 1300, 2500, 64
#: How thresholds come about.
CHOSEN = (
    "on other held-out pictures: image, then text, then decoder each go down the levels as long as the share of full depth's "
    "accuracy there is kept; the last level is the lowest that was tried"
)
#: Cosines tried, strictest first.
LEVELS = (math.inf, 0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.92, 0.88)


def asked(digit: int, kind: int, k: int) -> tuple[list[str], list[str]]:
    """(question, answer) in words; kinds 0 to 3."""
    if kind == 0:
        return ["which", "digit"], [DIGITS[digit]]
    if kind == 1:
        return ["plus", DIGITS[k]], [DIGITS[int(c)] for c in str(digit + k)]
    if kind == 2:
        return ["even"], ["yes" if digit % 2 == 0 else "no"]
    return ["more", "than", DIGITS[k]], ["yes" if digit > k else "no"]


def batch(pictures: Tensor, digits: Tensor, generator: torch.Generator) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """Inputs of both streams and answers int64 [n, 4]: start, one or two words, end, padding -100."""
    n = len(digits)
    kinds = torch.randint(0, 4, (n,), generator=generator).tolist()
    numbers = torch.randint(0, 10, (n,), generator=generator).tolist()
    pairs = [asked(d, kind, k) for d, kind, k in zip(digits.tolist(), kinds, numbers, strict=True)]
    questions = torch.zeros(n, 3, dtype=torch.int64)
    answers = torch.full((n, 4), -100)
    answers[:, 0] = NUMBER["<start>"]
    for row, (question, answer) in enumerate(pairs):
        questions[row, : len(question)] = torch.tensor([NUMBER[word] for word in question])
        words = [NUMBER[word] for word in answer] + [NUMBER["<end>"]]
        answers[row, 1 : 1 + len(words)] = torch.tensor(words)
    text = {"input_ids": questions, "attention_mask": (questions != 0).long()}
    return {"image": {"pixel_values": pictures}, "text": text}, answers


def system() -> mue.MuE:
    """Untrained."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 128,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    words: dict[str, Any] = {**common, "vocab_size": len(WORDS), "max_position_embeddings": 8, "pad_token_id": 0}
    image = transformers.ViTModel(
        transformers.ViTConfig(**common, image_size=8, patch_size=2, num_channels=1), add_pooling_layer=False
    )
    text = transformers.BertModel(transformers.BertConfig(**words), add_pooling_layer=False)
    decoder = transformers.BertConfig(**words, is_decoder=True, add_cross_attention=True, bos_token_id=1, eos_token_id=2)
    return mue.MuE({"image": image, "text": text}, transformers.BertLMHeadModel(decoder))


def data() -> tuple[Tensor, Tensor]:
    """1797 pictures [1, 8, 8] and their digits, in a fixed order."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return (torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1)[order], torch.tensor(found.target)[order]


def train(folder: Path) -> mue.MuE:
    """The system of `folder`, trained if it is not there."""
    model, path = system(), folder / "mue.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    pictures, digits = (part[:TRAINED] for part in data())
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        rows = torch.randint(0, TRAINED, (BATCH,), generator=generator)
        inputs, answers = batch(pictures[rows], digits[rows], generator)
        value = mue.loss(model(inputs, answers[:, :-1].clamp_min(0)), answers[:, 1:])
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        if step % 250 == 0:
            print(f"step {step}: loss {value.item():.3f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def measured(model: mue.MuE, given: tuple[dict[str, dict[str, Tensor]], Tensor], limits: dict[str, float]) -> dict[str, Any]:
    """Exact answers, and the share of samples x layers (decoder: tokens x layers) that ran."""
    inputs, answers = given
    joined = model.encode(inputs, {name: limits[name] for name in ("image", "text")})
    out = model.generate(joined, decoder_threshold=limits["decoder"], max_new_tokens=3)
    said = torch.zeros_like(answers[:, 1:])
    said[:, : out.sequences.shape[1] - 1] = out.sequences[:, 1:]
    right = ((said == answers[:, 1:]) | (answers[:, 1:] == -100)).all(1)
    work = {name: joined.work[name].fraction for name in ("image", "text")} | {"decoder": out.work.fraction}
    known = {name: None if limit == math.inf else limit for name, limit in limits.items()}
    return {"thresholds": known, "accuracy": float(right.float().mean()), "work": work}


def frontier(model: mue.MuE) -> dict[str, Any]:
    """Each part by itself, then all three, chosen on one half of the held-out pictures, measured on the other."""
    pictures, digits = data()
    half = (len(digits) - TRAINED) // 2
    parts = [slice(TRAINED, TRAINED + half), slice(TRAINED + half, None)]
    # Four questions per picture.
    dev, test = (
        batch(pictures[part].repeat(4, 1, 1, 1), digits[part].repeat(4), torch.Generator().manual_seed(7 + at))
        for at, part in enumerate(parts)
    )
    closed = dict.fromkeys(("image", "text", "decoder"), math.inf)
    full = measured(model, dev, closed)
    rows = [{"system": "full depth", **measured(model, test, closed)}]
    for share in (0.99, 0.96):
        chosen = dict(closed)
        for part in closed:  # one after the other: the lowest level that keeps the share, given those before
            for level in LEVELS:
                if measured(model, dev, {**chosen, part: level})["accuracy"] < share * full["accuracy"]:
                    break
                chosen[part] = level
        rows.append({"system": f"{share:.0%} of full depth asked for", **measured(model, test, chosen)})
    return {
        "model": f"ViT, BERT and a BERT decoder, {LAYERS} layers of {WIDTH} each", "layers": LAYERS,
        "data": "scikit-learn's digits, questions in words", "questions": len(test[1]),
        "pictures": {"train": TRAINED, "choose": half, "test": len(digits) - TRAINED - half},
        "steps": STEPS, "batch": BATCH, "chosen": CHOSEN,
        "levels": [level for level in LEVELS if level < math.inf], "full_depth_when_choosing": full["accuracy"],
        "machine": info.collect(), "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    figures = frontier(train(given.build))
    text = json.dumps(figures, indent=1) + "\n"
    print(text)
    with replacing(given.results or given.build / "mue.json") as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
