"""`make calibrate-demo`: what the demo's exits can be certified for, and the losses it rests on.

Writes build/calibration.json (certificates for several risks, and the loss of every point of the path) and
build/disagreement.npz: `losses` [points of the path, requests] and `rows_x_layers` [points], which the tests of the bounds
draw from. With `--keep` the demo's exits are replaced by the same with thresholds certified for a disagreement of 5 %.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

import dyndepth
from dyndepth.calibration import default_path, learn_then_test
from dyndepth.calibration.bounds import BOUNDS
from dyndepth.calibration.requests import Lost, Requests
from dyndepth.demo.prompts import calibrating
from dyndepth.demo.weights import EXITS, chat, load
from dyndepth.exits import Exits
from dyndepth.files import replacing

_RISKS = (0.03, 0.05, 0.1)
_ERROR = 0.05
_KEPT_RISK = 0.05


class _Remembering(Requests):
    """Requests that measure a vector of thresholds once: the path is walked for the table, and again for certificates."""

    def lost(self, exits: Exits, loss: str = "disagreement", kv: str | None = None, advance: Any = lambda count: None) -> Lost:
        key = (*(band.threshold for band in exits), loss, kv)
        known = self.__dict__.setdefault("_known", {})
        if key not in known:
            known[key] = super().lost(exits, loss, kv, advance)
        return known[key]


def main(folder: Path, keep: bool) -> None:
    model, tokenizer, exits = load()
    with Progress() as bars:

        def stage(name: str) -> Any:
            task = bars.add_task(f"{name:<24}", total=len(prompts))
            return lambda count: bars.advance(task, count)

        prompts = [chat(tokenizer, prompt) for prompt in calibrating()]
        requests = _Remembering(model, prompts, tokenizer, new_tokens=64, advance=stage("answering"))
        path = default_path(exits)
        lost = [
            requests.lost(exits.with_thresholds(point), advance=stage(f"point {k + 1} of {len(path)}"))
            for k, point in enumerate(path)
        ]
    losses = np.stack([found.losses for found in lost])
    certified = []
    for risk in _RISKS:
        for bound in BOUNDS:
            selection = learn_then_test(losses, risk, _ERROR, bound)
            k = selection.chosen
            certified.append(
                {
                    "risk": risk,
                    "confidence": 1 - _ERROR,
                    "bound": bound,
                    "point": k,
                    "measured_risk": None if k is None else float(losses[k].mean()),
                    "rows_x_layers": None if k is None else lost[k].work.fraction,
                }
            )
    result = {
        "model": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "requests": len(requests),
        "new_tokens": requests.new_tokens,
        "data_hash": requests.data_hash,
        "rounding_floor": requests.rounding,
        "bands": [[band.leave, band.resume] for band in exits],
        "path": [
            {
                "thresholds": point,
                "disagreement": float(found.losses.mean()),
                "rows_x_layers": found.work.fraction,
            }
            for point, found in zip(path, lost, strict=True)
        ],
        "certified": certified,
    }
    with replacing(folder / "calibration.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    with replacing(folder / "disagreement.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, losses=losses.astype(np.float32), rows_x_layers=np.array([found.work.fraction for found in lost])
        )
    for entry in certified:
        print(entry)
    if keep:
        kept = dyndepth.calibrate(model, exits, requests, risk=_KEPT_RISK, confidence=1 - _ERROR)
        kept.save_pretrained(EXITS)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--keep"]
    main(Path(arguments[0] if arguments else "build"), "--keep" in sys.argv)
