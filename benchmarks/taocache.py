"""TaoCache on a small DiT: steps that run the model against how far the pictures end from those of all steps.

    python benchmarks/taocache.py BUILD_FOLDER [--results docs/results/taocache.json]

The DiT of tests/tiny_dit.py is trained on scikit-learn's digits (a trained one in BUILD_FOLDER is used again) and sampled with
40 steps of DDIM. The table comes from other noise than what is measured. "fewer steps" is the plain alternative: as many model
calls, spread evenly.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from dyndepth.utilities import TaoCache, calibrate_tao

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from tiny_dit import Ddim, TinyDiT

STEPS, TRAINING, BATCH, PROMPTS = 40, 4000, 64, 100
SETTINGS = ((0.98, 0.5, 1), (0.95, 0.5, 1), (0.95, 0.5, 2), (0.9, 0.5, 2), (0.9, 0.25, 3))


def train(folder: Path) -> Any:
    torch.manual_seed(0)
    model, path = TinyDiT(), folder / "dit.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    found = load_digits()
    pictures, labels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(found.target)
    ddim = Ddim(STEPS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=TRAINING, pct_start=0.1)
    for step in range(TRAINING):
        rows, times = torch.randint(len(labels), (BATCH,)), torch.randint(0, 1000, (BATCH,))
        noise = torch.randn(BATCH, 1, 8, 8)
        told = model(ddim.noised(pictures[rows], noise, times), times, labels[rows])
        loss = torch.nn.functional.mse_loss(told, noise)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
        if step % 500 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


@torch.no_grad()
def sampled(model: Any, seed: int, steps: int = STEPS, cache: TaoCache | None = None) -> tuple[Tensor, list[Tensor]]:
    """Pictures [PROMPTS, 1, 8, 8], ten of each digit, and the outputs of all steps."""
    ddim, labels, outputs = Ddim(steps), torch.arange(PROMPTS) % 10, []
    x = torch.randn(PROMPTS, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    for step, t in enumerate(ddim.timesteps):

        def run(x: Tensor, labels: Tensor, t: Tensor = t) -> Tensor:
            return model(x, t.expand(len(x)), labels)

        outputs.append(run(x, labels) if cache is None else cache(run, step, x, labels))
        x = ddim.step(outputs[-1], step, x)
    return x, outputs


def psnr(found: Tensor, wanted: Tensor) -> float:
    """dB, mean over pictures, of values with a range of 2."""
    error = (found.clamp(-1, 1) - wanted.clamp(-1, 1)).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error.clamp_min(1e-12))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    model = train(given.build)
    table = calibrate_tao([sampled(model, seed)[1] for seed in (1, 2)])
    full, _ = sampled(model, 3)
    rows = []
    for threshold, start, most in SETTINGS:
        cache = TaoCache(table, threshold=threshold, start=start, most=most)
        found, _ = sampled(model, 3, cache=cache)
        per_prompt = torch.stack(cache.runs).sum(0)
        fewer, _ = sampled(model, 3, steps=max(1, round(cache.fraction * STEPS)))
        rows.append(
            {
                "threshold": threshold, "start": start, "most": most, "model_calls": cache.fraction * STEPS,
                "fewest": int(per_prompt.min()), "most_calls": int(per_prompt.max()),
                "psnr": psnr(found, full), "psnr_fewer_steps": psnr(fewer, full),
            }
        )  # fmt: skip
    text = json.dumps({"steps": STEPS, "prompts": PROMPTS, "rows": rows, "table": table.to_json()}, indent=1) + "\n"
    print(text)
    if given.results is not None:
        given.results.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
