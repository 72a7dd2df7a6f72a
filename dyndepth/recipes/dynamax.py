"""DYNAMAX (arXiv 2504.20922): exit classifiers for Transformers and Mamba that predict whether it is safe to leave.

The token itself comes from the shared final norm and LM head. A classifier after some layers of the second half says whether
the exit's token is among the full model's top k, a label that is less rare than equality. Skipped layers get copied K,V (a
Transformer), or keep or merely update their states (Mamba).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dyndepth.closed_form.trace import trace
from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits import Band, Exits, RouterScore
from dyndepth.files import require
from dyndepth.runtime import entry
from dyndepth.runtime.bind import bind
from dyndepth.runtime.fingerprint import facts_of
from dyndepth.ssm import CLASSIFIERS, Classifier, MambaDecoder, SsmExit, SsmExits
from dyndepth.ssm.exits import MODEL_TYPES
from dyndepth.ssm.exits import facts_of as ssm_facts_of

NAME = "DYNAMAX (arXiv 2504.20922)"


def default_exits(layers: int) -> tuple[int, ...]:
    """Every second boundary of the second half of the network."""
    return tuple(range(max(1, layers // 2), layers, 2))


def weights(count: int) -> list[float]:
    """Weights of the classifiers' losses, first to last: falling linearly from 1 to 1 / count."""
    return [(count - at) / count for at in range(count)]


def safe(exit_logits: Tensor, full_logits: Tensor, top_k: int) -> Tensor:
    """bool [...]: the exit's arg max is among the `top_k` largest of the full model's logits; both [..., vocabulary].

    A tie with the k-th largest counts as among them.
    """
    if not 1 <= top_k <= full_logits.shape[-1]:
        raise ArgumentError(f"dynamax.safe: top_k must be 1 to {full_logits.shape[-1]}, got {top_k}")
    said = full_logits.gather(-1, exit_logits.argmax(-1, keepdim=True))[..., 0]
    return said >= full_logits.topk(top_k, dim=-1).values[..., -1]


def loss(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Binary cross-entropies of all classifiers, first to last, under `weights`; logits [...] and bool targets [...] each."""
    if not logits or len(logits) != len(targets):
        raise ArgumentError(f"dynamax.loss: wanted as many logits as targets, got {len(logits)} and {len(targets)}")
    parts = [
        weight * torch.nn.functional.binary_cross_entropy_with_logits(z, target.float())
        for weight, z, target in zip(weights(len(logits)), logits, targets, strict=True)
    ]
    return torch.stack(parts).sum()


def observed(model: Any, tokens: Tensor, leave: Sequence[int], top_k: int) -> tuple[list[Tensor], list[Tensor]]:
    """(residuals fp32 [t, d], safe to leave bool [t]) per boundary, of one sequence int64 [t] at full depth."""
    if _is_mamba(model):
        out = model(tokens[None].to(model.device), output_hidden_states=True, use_cache=False)
        residuals = [out.hidden_states[at - 1][0] for at in leave]
        exits = [model.lm_head(model.backbone.norm_f(x).to(model.lm_head.weight.dtype)) for x in residuals]
        full = out.logits[0]
    else:
        bound = bind(model)
        chunk = next(iter(trace(bound, [tokens], leave, ())))
        residuals = [chunk.residual[at] for at in leave]
        exits = [bound.logits(bound.finish(x)) for x in residuals]
        full = bound.logits(chunk.ready)
    return [x.float() for x in residuals], [safe(z, full, top_k) for z in exits]


def train(
    model: Any,
    sequences: Sequence[Tensor],
    *,
    leave: Sequence[int] = (),
    kind: str = "linear",
    top_k: int = 3,
    epochs: int = 4,
    lr: float = 2e-3,
    held_out: float = 0.2,
    threshold: float = 0.9,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """Distil "safe to leave" from the full model into classifiers; the backbone is frozen.

    Args:
        model: a supported transformers causal LM, or a MambaForCausalLM, in eval mode.
        sequences: int64 [t] each. Calibration must see others.
        leave: boundaries; by default every second of the second half.
        kind: `linear`, `ffn` or, for Mamba backbones, `mamba`.
        top_k: the exit's token is safe if it is among so many of the full model's.
        epochs, lr: of AdamW, a sequence per step, the rate falling linearly to 0.
        held_out: share of the sequences that are not learned from; record["dynamax"]["held_out"] says what is reached there.
        threshold: of the exits that are returned.
        settings: of the classifier (`neurons`, `states`, ...).

    Residuals are computed once and kept: tokens x boundaries x width x 4 bytes.

    Returns SsmExits for a Mamba model, else Exits (to be used with kv="copy").
    """
    mamba = _is_mamba(model)
    if kind not in CLASSIFIERS:
        raise ArgumentError(f"dynamax.train: kind must be one of {', '.join(CLASSIFIERS)}, got {kind!r}")
    if CLASSIFIERS[kind].remembers and not mamba:
        raise ArgumentError(
            f"dynamax.train: {kind} classifiers remember their sequence, which passes of a Transformer cannot yet"
        )
    layers = len(model.backbone.layers) if mamba else bind(model).depth
    width = int(model.config.hidden_size)
    chosen = sorted(set(leave)) or list(default_exits(layers))
    if not all(1 <= at < layers for at in chosen):
        raise ArgumentError(f"dynamax.train: leave must be boundaries in [1, {layers}), got {chosen}")
    if not 0 < held_out < 1:
        raise ArgumentError(f"dynamax.train: held_out must be between 0 and 1, got {held_out}")
    tested = max(1, round(len(sequences) * held_out))
    if len(sequences) - tested < 1:
        raise NotEnoughDataError(f"dynamax.train: wanted at least 2 sequences, got {len(sequences)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # In eval mode throughout: in training mode transformers' mixer takes a fused path that cannot start from a state.
        classifiers = [CLASSIFIERS[kind](width, **settings).to(model.device).eval() for _ in chosen]
    learned = [sequences[at] for at in order[tested:]]
    _fit(model, classifiers, chosen, learned, top_k=top_k, epochs=epochs, lr=lr, generator=generator)
    about = {
        "kind": kind, "top_k": top_k, "sequences": len(sequences),
        "held_out": _reached(model, classifiers, chosen, [sequences[at] for at in order[:tested]], top_k),
    }  # fmt: skip
    record = {"recipe": NAME, "dynamax": about}
    if mamba:
        points = [SsmExit(at, one, threshold) for at, one in zip(chosen, classifiers, strict=True)]
        return SsmExits(points, ssm_facts_of(model), record).eval()
    bands = [
        Band(at, layers, RouterScore(one.router()), threshold=threshold) for at, one in zip(chosen, classifiers, strict=True)
    ]
    return Exits(bands, facts_of(bind(model)), record)


@torch.enable_grad()
def _fit(
    model: Any,
    classifiers: list[Classifier],
    leave: Sequence[int],
    sequences: Sequence[Tensor],
    *,
    top_k: int,
    epochs: int,
    lr: float,
    generator: torch.Generator,
) -> None:
    parameters = [p for one in classifiers for p in one.parameters()]
    require("accelerate", "training needs the package accelerate: pip install 'dyndepth[train]'")
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no", cpu=model.device.type == "cpu")
    optimizer: Any = accelerator.prepare(torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01))
    steps = epochs * len(sequences)
    with torch.no_grad():
        seen = [observed(model, tokens, leave, top_k) for tokens in sequences]
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for at in torch.randperm(len(sequences), generator=generator).tolist():
            residuals, targets = seen[at]
            value = loss([one(x[None])[0] for one, x in zip(classifiers, residuals, strict=True)], targets)
            optimizer.zero_grad()
            accelerator.backward(value)
            optimizer.step()
            decay.step()


@torch.no_grad()
def _reached(
    model: Any, classifiers: list[Classifier], leave: Sequence[int], sequences: Sequence[Tensor], top_k: int
) -> dict[str, dict[str, float]]:
    """Per boundary: rows, how many are safe, and the log-loss of the classifier beside that of the constant guess."""
    scores: list[list[Tensor]] = [[] for _ in leave]
    labels: list[list[Tensor]] = [[] for _ in leave]
    for tokens in sequences:
        residuals, targets = observed(model, tokens, leave, top_k)
        for at, (one, x, target) in enumerate(zip(classifiers, residuals, targets, strict=True)):
            scores[at].append(one(x[None])[0])
            labels[at].append(target)
    found = {}
    for at, boundary in enumerate(leave):
        z, y = torch.cat(scores[at]), torch.cat(labels[at]).float()
        rate = y.mean().clamp(1e-6, 1 - 1e-6)
        measure = torch.nn.functional.binary_cross_entropy_with_logits
        found[str(boundary)] = {
            "rows": len(y), "safe": float(y.mean()), "log_loss": float(measure(z, y)),
            "log_loss_of_constant": float(measure(torch.logit(rate).expand_as(y), y)),
        }  # fmt: skip
    return found


def generate(
    model: Any,
    inputs: Mapping[str, Any] | Tensor,
    exits: Any,
    *,
    policy: str | None = None,
    threshold: float | None = None,
    **options: Any,
) -> Any:
    """Greedy generation under the exits that `train` made.

    Args:
        inputs: what a tokenizer returns (padded on the left), or input ids [n, t].
        policy: of skipped layers: `copy` (K,V of the last layer that ran) for a Transformer; `leave` (the default) or
            `update` for Mamba.
        threshold: in place of the exits' own.
        options: of `model.generate` with dyndepth.generate, or of dyndepth.ssm.MambaDecoder.generate (`repetition_penalty`).
    """
    content = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    chosen = exits if threshold is None else exits.with_thresholds(threshold)
    if isinstance(exits, SsmExits):
        return MambaDecoder(model, chosen).generate(**content, policy="leave" if policy is None else policy, **options)
    kv = "copy" if policy is None else policy
    return model.generate(**content, custom_generate=entry.generate, exits=chosen, kv=kv, **options)


def _is_mamba(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "model_type", None) in MODEL_TYPES
