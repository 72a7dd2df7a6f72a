"""LayerSkip (arXiv 2404.16710): training of the base itself, so that its own norm and head can read every layer.

Layers are dropped at random, later ones more often, and an early-exit loss is added at some layers per step. There is nothing
to store beside the model: all exits share its final norm and LM head. Early layers then draft tokens that the others verify
(`speculate`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dyndepth.closed_form.progress import Progress
from dyndepth.data import check_ids, encode
from dyndepth.errors import ArgumentError, NotEnoughDataError, TrainingError
from dyndepth.exits import Always, Band, Criterion, Exits, FixedDepth
from dyndepth.files import require
from dyndepth.runtime import entry
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.fingerprint import facts_of
from dyndepth.training.losses import cross_entropy
from dyndepth.training.stack import run_layer
from dyndepth.training.weighting import layerskip_dropout, layerskip_exits, layerskip_weights, warm_cosine

#: Logits alive at a time: more rows are computed in parts, and again for the gradient.
_LOGITS = 1 << 24


@dataclass(frozen=True)
class Settings:
    """How to train. The rates are those of continued training; from scratch they grow with the step (`from_scratch`)."""

    steps: int = 1000
    #: Sequences per step, and tokens of a sequence.
    batch: int = 8
    length: int = 512
    #: Linear warm-up over this share of the steps, then a cosine to zero.
    lr: float = 3e-5
    warmup: float = 0.01
    weight_decay: float = 0.0
    #: Gradients are scaled down to this norm; 0 leaves them.
    clip: float = 1.0
    #: Chance that the last layer is left out, per sequence; it falls to 0 at the first (dyndepth.training.weighting).
    dropout: float = 0.1
    from_scratch: bool = False
    #: Which boundaries have a loss when: `rotational` (every `every`-th, shifted each step) or `gradual` (from the top down).
    curriculum: str = "rotational"
    every: int = 8
    #: Weight of the early exits against the top; 0 trains the top alone.
    scale: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        def fail(name: str, wanted: str) -> None:
            raise ArgumentError(f"layerskip.train: {name} must be {wanted}, got {getattr(self, name)!r}")

        for name, least in (("steps", 1), ("batch", 1), ("length", 2), ("every", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                fail(name, f"a whole number from {least} up")
        for name in ("lr", "warmup", "weight_decay", "clip", "dropout", "scale"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                fail(name, "a finite number from 0 up")
        if self.lr == 0:
            fail("lr", "above 0")
        if self.warmup >= 1 or self.dropout > 1:
            fail("warmup" if self.warmup >= 1 else "dropout", "a share")
        if self.curriculum not in ("rotational", "gradual"):
            fail("curriculum", "rotational or gradual")


def train(
    model: Any, texts: Sequence[str | Tensor], tokenizer: Any = None, *, settings: Settings | None = None, progress: bool = True
) -> list[dict[str, Any]]:
    """Train a causal LM in place on the next tokens of texts. The same arguments give the same weights.

    Every step is a function of its number and the weights before it: the order of the texts and the layers left out are drawn
    from (seed, step). Nothing is written: keep the result with `model.save_pretrained`; a run that is killed starts anew.
    Runs on accelerate, whose own settings (`accelerate launch`, ACCELERATE_MIXED_PRECISION) hold. Load the model in fp32:
    rounding to bf16 loses most updates of such a small rate.

    Args:
        model: a supported transformers causal LM in eval mode (its own dropout, if it has any, stays off). Parameters that ask
            for no gradient stay as they are. Exits that were made for it before do not fit it afterwards.
        texts: strings (with `tokenizer`) or int64 [t]; longer ones are cut into sequences of `settings.length`.

    Returns an entry per step: step, loss (weighted), losses (nats per token, by boundary), lr, gradient_norm, dropped (pairs
    of a sequence and a layer that were left out) and tokens (that were predicted).

    Raises TrainingError when a loss or the gradient is not finite; the model then has the weights of the step before.
    """
    require("accelerate", "training needs the package accelerate: pip install 'dyndepth[train]'")
    from accelerate import Accelerator, DistributedDataParallelKwargs

    settings = settings or Settings()
    bound = bind(model)
    sequences = _sequences(texts, tokenizer, settings.length, bound)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ArgumentError("layerskip.train: no parameter of the model asks for a gradient, so there is nothing to train")
    # A layer that every sequence leaves out has no gradient, which several processes must expect.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=bound.device.type == "cpu", kwargs_handlers=[unused])
    if accelerator.device.type != bound.device.type:
        raise TrainingError(f"layerskip.train: the model is on {bound.device}, accelerate runs on {accelerator.device}")
    student: Any
    optimizer: Any = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    student, optimizer = accelerator.prepare(_Student(model, bound), optimizer)
    report, record = Progress(progress), []
    with torch.enable_grad(), report, report.stage("training", settings.steps) as advance:
        for step in range(settings.steps):
            entry = _step(accelerator, student, optimizer, sequences, settings, step)
            record.append(entry)
            advance(1, f"loss {entry['loss']:.3f}")
    optimizer.zero_grad(set_to_none=True)
    accelerator.free_memory()
    return record


def exits(model: Any, leave: int | Sequence[int]) -> Exits:
    """Exits with the model's own norm and head at `leave`, taken by requests that name their depth.

    Make them after training. `model.generate(..., custom_generate=dyndepth.generate, exits=exits, depth=leave, kv="none",
    prompt="dynamic")` is the model cut there.
    """
    return _exits(model, [leave] if isinstance(leave, int) else list(leave), FixedDepth(), "exits: leave")


def speculate(
    model: Any, inputs: Mapping[str, Any] | Tensor, exit_layer: int, num_speculations: int = 6, **options: Any
) -> Any:
    """`model.generate` by self-speculative decoding: layers below `exit_layer` draft, the others verify.

    Args:
        model: a supported transformers causal LM; how many drafts hold depends on its training (`train`).
        inputs: what a tokenizer returns (padded on the left), or input ids [batch, t].
        exit_layer: the boundary that every draft comes from (the paper's E).
        num_speculations: drafts of a sequence before they are verified; fewer only where it is about to end.
        options: of transformers' generate and of dyndepth.generate.

    Returns what transformers' generate returns: greedy tokens are the full model's, sampled ones have its distribution; with
    `return_dict_in_generate=True` also `drafted` and `accepted` [batch].
    """
    exits = _exits(model, [exit_layer], Always(), "speculate: exit_layer")
    content = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    return model.generate(
        **content, custom_generate=entry.generate, exits=exits, mode="lossless", drafts=num_speculations, **options
    )


def _exits(model: Any, leave: Sequence[int], criterion: Criterion, name: str) -> Exits:
    bound = bind(model)
    if not all(1 <= at < bound.depth for at in leave):
        raise ArgumentError(f"layerskip.{name} must be in [1, {bound.depth}), got {list(leave)}")
    bands = [Band(at, bound.depth, criterion) for at in leave]
    return Exits(bands, facts_of(bound), {"method": "LayerSkip (arXiv 2404.16710)"})


def exit_losses(model: Model, tokens: Tensor, labels: Tensor, boundaries: Sequence[int], dropped: Tensor) -> dict[int, Tensor]:
    """Cross-entropy per boundary with what the final norm and the LM head make of it; logits are computed nowhere else.

    Args:
        tokens: int64 [b, t], sequences padded at their ends.
        labels: int64 [b, t], the token that follows, -100 where none does; the mean is over the others.
        boundaries: 1 .. number of layers, which is the top.
        dropped: bool [layers, b] on the CPU; a sequence passes a layer that it leaves out unchanged.
    """
    batch, length = tokens.shape
    cos, sin = model.rotary_tables(length)
    pos = torch.arange(length, device=tokens.device).repeat(batch)
    hidden = model.embed(tokens.flatten(), pos).unflatten(0, (batch, length))
    found = {}
    for number, layer in enumerate(model.layers):
        kept = (~dropped[number]).nonzero()[:, 0].to(hidden.device)
        if len(kept) == batch:
            hidden = run_layer(layer, hidden, cos, sin)
        elif len(kept):
            hidden = hidden.index_copy(0, kept, run_layer(layer, hidden[kept], cos, sin))
        if number + 1 in boundaries:
            found[number + 1] = _exit_loss(model, hidden.flatten(0, 1), labels.flatten())
    return found


def _exit_loss(model: Model, hidden: Tensor, labels: Tensor) -> Tensor:
    wanted = labels != -100
    hidden, labels = hidden[wanted], labels[wanted]
    size = max(1, _LOGITS // model.vocab_size)

    def summed(rows: Tensor, answers: Tensor) -> Tensor:
        return cross_entropy(model.logits(model.finish(rows)), answers).sum()

    if len(labels) <= size:
        return summed(hidden, labels) / len(labels)
    parts = zip(hidden.split(size), labels.split(size), strict=True)
    losses = [checkpoint(summed, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(losses).sum() / len(labels)


class _Student(nn.Module):
    """The model as accelerate wraps it: its forward is the losses."""

    def __init__(self, causal_lm: nn.Module, bound: Model) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._bound = bound

    def forward(self, tokens: Tensor, labels: Tensor, boundaries: Sequence[int], dropped: Tensor) -> dict[int, Tensor]:
        return exit_losses(self._bound, tokens, labels, boundaries, dropped)


def _step(
    accelerator: Any, student: Any, optimizer: Any, sequences: Sequence[Tensor], settings: Settings, step: int
) -> dict[str, Any]:
    layers = accelerator.unwrap_model(student)._bound.depth
    on = layerskip_exits(layers, step, settings.steps, settings.curriculum, settings.every)
    weights = dict(zip(on, layerskip_weights(on, layers, settings.scale), strict=True))
    weights = {leave: weight for leave, weight in weights.items() if weight > 0}  # the lowest exit weighs nothing
    tokens, labels = _batch(sequences, settings, step * accelerator.num_processes + accelerator.process_index)
    dropped = _dropped(layers, tokens.shape[0], settings, step)
    rate = warm_cosine(settings.lr, settings.warmup, step, settings.steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    losses = student(tokens.to(accelerator.device), labels.to(accelerator.device), list(weights), dropped)
    for leave, loss in losses.items():
        _finite(float(loss.detach()), f"loss at boundary {leave}", step)
    loss = torch.stack([weights[leave] * value for leave, value in losses.items()]).sum()
    accelerator.backward(loss)
    norm = float(accelerator.clip_grad_norm_(student.parameters(), settings.clip or math.inf))
    if accelerator.scaler is None:  # a scaled fp16 gradient may overflow; its scaler then leaves the step out
        _finite(norm, "norm of the gradient", step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "step": step, "loss": float(loss.detach()), "losses": {leave: float(value.detach()) for leave, value in losses.items()},
        "lr": rate, "gradient_norm": norm, "dropped": int(dropped.sum()), "tokens": int((labels != -100).sum()),
    }  # fmt: skip


def _finite(value: float, name: str, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"layerskip.train: the {name} is {value} at step {step}; a lower lr or a smaller clip may help. The model has the "
            "weights of the step before"
        )


def _sequences(texts: Sequence[str | Tensor], tokenizer: Any, length: int, model: Model) -> list[Tensor]:
    """int64 [2 .. length] each."""
    given = encode(texts, tokenizer, "layerskip.train: texts", special=True)
    check_ids(given, model.vocab_size, "layerskip.train: texts")
    longest = model.positions_limit or getattr(model.config, "max_position_embeddings", None) or length
    parts = [part for ids in given for part in ids.split(min(length, longest)) if part.shape[0] >= 2]
    if not parts:
        raise NotEnoughDataError("layerskip.train: wanted at least one text of two tokens, got none")
    return parts


def _batch(sequences: Sequence[Tensor], settings: Settings, number: int) -> tuple[Tensor, Tensor]:
    """int64 [b, t] tokens and labels: batch `number` of an endless run, every epoch in an order of its own."""
    epoch, at = divmod(number, -(-len(sequences) // settings.batch))
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    order = torch.randperm(len(sequences), generator=generator).split(settings.batch)[at]
    chosen = [sequences[i] for i in order.tolist()]
    tokens = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    following = [torch.cat([ids[1:], ids.new_tensor([-100])]) for ids in chosen]
    return tokens, nn.utils.rnn.pad_sequence(following, batch_first=True, padding_value=-100)


def _dropped(layers: int, batch: int, settings: Settings, step: int) -> Tensor:
    """bool [layers, batch]: which sequences leave out which layers at a step; the same in every process."""
    progress = step / max(1, settings.steps - 1) if settings.from_scratch else 1.0
    chances = torch.tensor(layerskip_dropout(layers, settings.dropout, progress))
    generator = torch.Generator().manual_seed(settings.seed * 1_000_033 + step)
    return torch.rand(layers, batch, generator=generator) < chances[:, None]
