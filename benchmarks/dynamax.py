"""DYNAMAX on Mamba: three classifiers and both state policies, on newswire, against the same model at full depth.

    python benchmarks/dynamax.py BUILD_FOLDER [--results docs/results/dynamax.json]

A MambaForCausalLM is trained from nothing on the first 64 tokens of Reuters R52's documents (dyndepth.demo.tasks.reuters) and
frozen; a trained one in BUILD_FOLDER is used again. Classifiers learn on other documents. Thresholds are chosen on a part of
the held-out documents, per classifier and policy: the lowest that keeps the agreement asked for. Figures are of test
documents, teacher-forced: tokens leave as they would in generation, and the text goes on as it was written.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from dyndepth import info
from dyndepth.demo.tasks import reuters
from dyndepth.files import replacing
from dyndepth.recipes import dynamax
from dyndepth.ssm import CLASSIFIERS, POLICIES, MambaDecoder, SsmExits

LAYERS, WIDTH, STATES, WORDS, LENGTH = 8, 96, 8, 2000, 64
STEPS, BATCH, RATE = 1000, 16, 4e-3
#: Boundaries with classifiers: the second half, as in the paper; and the teacher's top k within which leaving is safe.
LEAVE, TOP_K = (4, 5, 6, 7), 3
#: Documents that train classifiers, that choose thresholds, and that are reported on; the first of these tokens are a prompt.
LEARN, CHOOSE, TEST, PROMPT = 160, 64, 128, 8
#: Thresholds tried, strictest first; agreements with full depth that are asked for.
LEVELS = tuple(1 / (1 + math.exp(0.3 * step - 8)) for step in range(31))
WANTED = (0.95, 0.9, 0.8)


def texts() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Training, held-out and test documents as int64 [LENGTH] each: MiniLM's commonest word pieces, all others are word 0."""
    _, tokenizer = reuters.minilm()
    found = reuters.documents()
    parts = []
    for split in (found.train, found.held_out, found.test):
        given = tokenizer([text[: 24 * LENGTH] for text in split.texts], add_special_tokens=False)["input_ids"]
        parts.append([ids[:LENGTH] for ids in given if len(ids) >= LENGTH])
    common = Counter(piece for ids in parts[0] for piece in ids).most_common(WORDS - 1)
    number = {piece: at + 1 for at, (piece, _) in enumerate(common)}
    train, held, test = ([torch.tensor([number.get(piece, 0) for piece in ids]) for ids in part] for part in parts)
    return train, held, test


def mixed(mixer: Any, x: Tensor) -> Tensor:
    """A mixer on whole sequences [n, t, d], as transformers computes it, but its states come from one unbinding.

    Without a fused kernel transformers takes a slice of [n, inner, t, states] per token, and each slice's gradient is a tensor
    of that whole size: tens of times slower than this.
    """
    u, gate = mixer.in_proj(x).chunk(2, -1)
    u = torch.nn.functional.silu(mixer.conv1d(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    rank, into, out_of = mixer.x_proj(u).split(sizes, -1)
    step = torch.nn.functional.softplus(mixer.dt_proj(rank))
    decay = torch.exp(step[..., None] * -torch.exp(mixer.A_log))
    given = (step * u)[..., None] * into[:, :, None]
    state, read = torch.zeros_like(given[:, 0]), []
    for keep, more, look in zip(decay.unbind(1), given.unbind(1), out_of.unbind(1), strict=True):
        state = keep * state + more
        read.append((state * look[:, None]).sum(-1))
    return mixer.out_proj((torch.stack(read, 1) + u * mixer.D) * torch.nn.functional.silu(gate))


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """[n, t, words] of int64 [n, t]."""
    x = model.backbone.embeddings(tokens)
    for layer in model.backbone.layers:
        x = x + mixed(layer.mixer, layer.norm(x))
    return model.lm_head(model.backbone.norm_f(x))


def mamba(folder: Path, train: Sequence[Tensor]) -> Any:
    """The model of `folder`, trained if it is not there: next-token cross-entropy, all layers, no exits."""
    if (folder / "model" / "config.json").exists():
        return transformers.MambaForCausalLM.from_pretrained(folder / "model").eval()
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=STATES, pad_token_id=0, bos_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    model: Any = transformers.MambaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    documents = torch.stack(list(train))
    model.eval()  # nothing here has dropout
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, documents[:2]), model(documents[:2]).logits, rtol=1e-3, atol=1e-4)
    for step in range(STEPS):
        tokens = documents[torch.randint(0, len(documents), (BATCH,), generator=generator)]
        logits = logits_of(model, tokens)[:, :-1]
        value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        if step % 100 == 0:
            print(f"step {step}: loss {value.item():.3f}", flush=True)
    model.save_pretrained(folder / "model")
    return model


def classifiers(folder: Path, model: Any, kind: str, sequences: Sequence[Tensor]) -> SsmExits:
    """Trained once and kept."""
    place = folder / kind
    if not (place / "exits.json").exists():
        print(f"training {kind} classifiers", flush=True)
        dynamax.train(model, sequences, leave=LEAVE, kind=kind, top_k=TOP_K).save_pretrained(place)
    return SsmExits.from_pretrained(place)


def read(model: Any, exits: SsmExits, text: Tensor, full: Any, policy: str) -> dict[str, float]:
    """Under an exit policy: how often full depth's token, how often the text's, its loss in nats, rows x layers."""
    told = MambaDecoder(model, exits).score(text, begin=PROMPT, policy=policy)
    return {
        "agreement": float((told.tokens == full.tokens).float().mean()),
        "accuracy": float((told.tokens == text[:, PROMPT:]).float().mean()),
        "loss": float(-told.log_probs.mean()),
        "rows_x_layers": told.work.fraction,
        "states_updated": told.updated / told.work.possible,
    }


def frontier(folder: Path) -> dict[str, Any]:
    train, held, test = texts()
    model = mamba(folder, train)
    choose, final = torch.stack(held[LEARN : LEARN + CHOOSE]), torch.stack(test[:TEST])
    closed = classifiers(folder, model, "linear", held[:LEARN]).with_thresholds(math.inf)
    full = {name: MambaDecoder(model, closed).score(text, begin=PROMPT) for name, text in (("choose", choose), ("test", final))}
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    for kind in CLASSIFIERS:
        exits = classifiers(folder, model, kind, held[:LEARN])
        about[kind] = exits.record["dynamax"]["held_out"]
        for policy in POLICIES:
            tried = []
            for level in LEVELS:
                found = read(model, exits.with_thresholds(level), choose, full["choose"], policy)
                tried.append((level, found["agreement"]))
                if found["agreement"] < min(WANTED):
                    break
            for wanted in WANTED:
                kept = [level for level, agreement in tried if agreement >= wanted]
                level = min(kept, default=math.inf)
                row = read(model, exits.with_thresholds(level), final, full["test"], policy)
                rows.append(
                    {"kind": kind, "policy": policy, "wanted": wanted, "threshold": level if kept else None, **row}
                )  # fmt: skip
                print(rows[-1], flush=True)
    return {
        "model": f"Mamba, {LAYERS} layers of {WIDTH}", "parameters": sum(p.numel() for p in model.parameters()),
        "data": "Reuters R52", "words": WORDS, "tokens": LENGTH, "prompt": PROMPT, "layers": LAYERS, "leave": LEAVE,
        "documents": {"train": len(train), "learn": LEARN, "choose": CHOOSE, "test": TEST}, "top_k": TOP_K,
        "steps": STEPS, "batch": BATCH,
        "chosen": "thresholds: the lowest whose agreement with full depth on the documents that choose is the one asked for",
        "full_depth": {
            "accuracy": float((full["test"].tokens == final[:, PROMPT:]).float().mean()),
            "loss": float(-full["test"].log_probs.mean()),
        },
        "classifiers": about, "machine": info.collect(), "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    given.build.mkdir(parents=True, exist_ok=True)
    with replacing(given.results or given.build / "dynamax.json") as temporary:
        temporary.write_text(json.dumps(frontier(given.build), indent=1) + "\n")


if __name__ == "__main__":
    main()
