"""SampleExits: where whole samples may leave an encoder, kept in safetensors + JSON."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.encoders.criteria import SAMPLE_CRITERIA, SampleCriterion
from dyndepth.encoders.heads import HEADS, ModelHead, SampleHead
from dyndepth.errors import ExitsError
from dyndepth.exits import store
from dyndepth.exits.codec import number_to_json
from dyndepth.exits.criteria import Criterion, Never
from dyndepth.exits.store import ModelFacts

FORMAT, VERSION = "dyndepth-sample-exits", 1


@dataclasses.dataclass(frozen=True)
class EncoderFacts(ModelFacts):
    """Facts of an encoder; `width` is that of its top."""

    #: Width of the residuals at boundaries 1, 2, ... where they differ; empty where all are `width`.
    widths: tuple[int, ...] = ()

    def width_at(self, boundary: int) -> int:
        return self.widths[boundary - 1] if self.widths else self.width

    @classmethod
    def from_json(cls, entry: Any) -> EncoderFacts:
        facts = super().from_json(entry)
        assert isinstance(facts, EncoderFacts)
        widths = tuple(facts.widths)
        if widths and (len(widths) != facts.layers or any(type(width) is not int or width < 1 for width in widths)):
            raise TypeError(f"model: wanted {facts.layers} positive widths, got {widths}")
        return dataclasses.replace(facts, widths=widths)


class SampleExit(nn.Module):
    """One place where samples may leave.

    Args:
        leave: layers below it, from 1.
        head: answers for those that leave.
        criterion: from dyndepth.encoders.criteria, or one of dyndepth.exits.criteria that serves samples.
        threshold: a sample leaves when its score reaches it; +inf closes the exit.
    """

    def __init__(self, leave: int, head: SampleHead, criterion: Criterion, threshold: float = math.inf) -> None:
        super().__init__()
        if leave < 1:
            raise ExitsError(f"sample exit: leave must be at least 1, got {leave}")
        if criterion.kind not in SAMPLE_CRITERIA:
            raise ExitsError(
                f"sample exit at {leave}: criterion must be one of {', '.join(SAMPLE_CRITERIA)}, got {criterion.kind!r}"
            )
        if math.isnan(threshold):
            raise ExitsError(f"sample exit at {leave}: threshold must be a number, got NaN")
        if head.per_token is not None:
            check_answers(leave, head, criterion, head.per_token)
        self.leave = leave
        self.head = head
        self.criterion = criterion
        self.judge: nn.Module | None = criterion.module if isinstance(criterion, SampleCriterion) else None
        self.threshold = float(threshold)


def check_answers(leave: int, head: SampleHead, criterion: Criterion, per_token: bool) -> None:
    """ExitsError unless the criterion reads what the head answers, logits per token or per sample."""
    wanted = isinstance(criterion, SampleCriterion) and criterion.per_token
    if criterion.needs_logits and wanted != per_token:
        raise ExitsError(
            f"sample exit at {leave}: criterion {criterion.kind} reads answers per {'token' if wanted else 'sample'}, "
            f"a head of kind {head.kind} answers per {'token' if per_token else 'sample'}"
        )


class SampleExits(nn.Module):
    """Exits in ascending order of `leave`, the facts of the model they were made for, and what their maker remembers.

    Args:
        exits: at most one per boundary. Heads and lambda heads may be shared between exits; files keep the sharing.
        model: from `dyndepth.encoders.facts_of(model)`; checked against the model it is used with.
        final: answers at the top for a model without a head of its own (a sentence encoder).
        record: plain JSON.
    """

    def __init__(
        self,
        exits: Iterable[SampleExit],
        model: EncoderFacts,
        *,
        final: SampleHead | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        ordered: list[SampleExit] = sorted(exits, key=_leave)
        self.exits = nn.ModuleList(ordered)
        self.model = model
        self.final = final
        self.record = record or {}
        leaves = [point.leave for point in self]
        if len(set(leaves)) != len(leaves):
            raise ExitsError(f"sample exits: at most one exit per boundary, got {leaves}")
        if leaves and leaves[-1] >= model.layers:
            raise ExitsError(f"sample exits: leave must be below the model's {model.layers} layers, got {leaves[-1]}")
        heads = [*((f"exit at {e.leave}", e.leave, e.head) for e in self), ("final head", model.layers, final)]
        for name, leave, part in heads:
            if part is None:
                continue
            if part.classes not in (None, model.vocab_size) or part.width not in (None, model.width_at(leave)):
                raise ExitsError(
                    f"sample exits: {name} must read {model.width_at(leave)} and answer {model.vocab_size} classes, got "
                    f"{part.width} and {part.classes}"
                )
            if isinstance(part, ModelHead) and model.width_at(leave) != model.width:
                raise ExitsError(
                    f"sample exits: {name} must have a head of its own: the model's reads {model.width}, there are "
                    f"{model.width_at(leave)}"
                )
        for before, after in itertools.pairwise(self):
            if after.criterion.needs_previous and model.width_at(before.leave) != model.width_at(after.leave):
                raise ExitsError(
                    f"sample exits: criterion {after.criterion.kind} compares the residuals after layers {before.leave} and "
                    f"{after.leave}, whose widths differ"
                )

    def __iter__(self) -> Iterator[SampleExit]:
        return iter(self.exits)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.exits)

    def with_thresholds(self, thresholds: float | Sequence[float]) -> SampleExits:
        """The same exits with other thresholds (one for all, or one each); weights are shared."""
        values = [thresholds] * len(self) if isinstance(thresholds, int | float) else list(thresholds)
        if len(values) != len(self) or any(math.isnan(value) for value in values):
            raise ExitsError(f"with_thresholds: wanted {len(self)} numbers that are not NaN, got {values}")
        exits = [SampleExit(e.leave, e.head, e.criterion, float(v)) for e, v in zip(self, values, strict=True)]
        return SampleExits(exits, self.model, final=self.final, record=self.record)

    def with_criterion(self, criterion: Criterion, thresholds: float | Sequence[float]) -> SampleExits:
        """The same heads judged by another criterion without weights of its own."""
        other = [SampleExit(e.leave, e.head, criterion) for e in self]
        return SampleExits(other, self.model, final=self.final, record=self.record).with_thresholds(thresholds)

    def closed(self) -> SampleExits:
        """The same exits, but no sample leaves."""
        exits = [SampleExit(e.leave, e.head, e.criterion if e.criterion.scored else Never()) for e in self]
        return SampleExits(exits, self.model, final=self.final, record=self.record)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `exits.json` and one safetensors file. An existing set is replaced in one step, or not at all."""
        seen: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        entries = []
        for number, point in enumerate(self):
            criterion = {
                field.name: getattr(point.criterion, field.name)
                for field in dataclasses.fields(point.criterion)
                if field.name != "module"
            }
            entries.append(
                {
                    "leave": point.leave,
                    "threshold": number_to_json(point.threshold),
                    "head": _described(point.head, point.head.kind, point.head.settings, f"{number}.head", seen, tensors),
                    "criterion": {"kind": point.criterion.kind, **criterion},
                    "judge": None
                    if point.judge is None or not isinstance(point.criterion, SampleCriterion)
                    else _described(
                        point.judge, point.criterion.kind, point.criterion.module_settings(), f"{number}.judge", seen, tensors
                    ),
                }
            )
        final = self.final
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "model": dataclasses.asdict(self.model),
            "exits": entries,
            "final": None if final is None else _described(final, final.kind, final.settings, "final", seen, tensors),
            "record": self.record,
        }
        store.write(Path(folder), manifest, tensors)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SampleExits:
        """Read what `save_pretrained` wrote; ExitsError says what is wrong with it. Never runs code from the files."""
        manifest, tensors = store.read(Path(folder), FORMAT, VERSION)
        try:
            reader = _Reader(tensors)
            exits = [reader.exit(entry) for entry in manifest["exits"]]
            final = None if manifest["final"] is None else reader.head(manifest["final"])
            made = cls(exits, EncoderFacts.from_json(manifest["model"]), final=final, record=dict(manifest["record"] or {}))
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            if isinstance(error, ExitsError):
                raise
            path = Path(folder) / store.MANIFEST
            raise ExitsError(f"exits: {path} is damaged: {type(error).__name__}: {error}") from error
        if reader.used != set(tensors):
            raise ExitsError(f"exits: {folder} describes {len(reader.used)} tensors, the file holds {len(tensors)}")
        return made.eval()


def _leave(point: SampleExit) -> int:
    return point.leave


def _described(
    part: nn.Module, kind: str, settings: dict[str, Any], name: str, seen: dict[int, str], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """JSON of a head or judge; its tensors are added under `name`, once however many exits share it or a part of it.

    `shared` names parts (PABEE's pooler) that another head or judge holds too, and where: {path: name there}.
    """
    if id(part) in seen:
        return {"same_as": seen[id(part)]}
    shared: dict[str, str] = {}
    for path, module in part.named_modules():
        if _below(path, shared) or not module.state_dict():
            continue
        if id(module) in seen:
            shared[path] = seen[id(module)]
        else:
            seen[id(module)] = f"{name}.{path}" if path else name
    seen[id(part)] = name
    tensors.update({f"{name}.{key}": value for key, value in part.state_dict().items() if not _below(key, shared)})
    return {"kind": kind, "settings": settings, "tensors": name, **({"shared": shared} if shared else {})}


def _below(path: str, parents: Iterable[str]) -> bool:
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)


class _Reader:
    """Rebuilds modules from JSON and tensors, shared ones once."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.made: dict[str, Any] = {}
        self.used: set[str] = set()

    def exit(self, entry: dict[str, Any]) -> SampleExit:
        options = dict(entry["criterion"])
        kind = options.pop("kind")
        if kind not in SAMPLE_CRITERIA:
            raise ExitsError(f"exits: criterion must be one of {', '.join(SAMPLE_CRITERIA)}, got {kind!r}")
        criterion = SAMPLE_CRITERIA[kind](**options)
        if entry["judge"] is not None:
            if not isinstance(criterion, SampleCriterion):
                raise ExitsError(f"exits: criterion {kind} has no weights, the file brings some")
            make = criterion.make_module
            judge = self.module(entry["judge"], lambda _kind, settings: make(settings))
            if isinstance(judge, SampleHead):
                raise ExitsError(f"exits: the weights of criterion {kind} refer to a head")
            criterion = dataclasses.replace(criterion, module=judge)
        return SampleExit(int(entry["leave"]), self.head(entry["head"]), criterion, float(entry["threshold"]))

    def head(self, entry: dict[str, Any]) -> SampleHead:
        made = self.module(entry, _head)
        if not isinstance(made, SampleHead):
            raise ExitsError("exits: a head refers to something that is not a head")
        return made

    def module(self, entry: dict[str, Any], make: Any) -> Any:
        if "same_as" in entry:
            return self.made[entry["same_as"]]
        name = entry["tensors"]
        values = store.part(self.tensors, f"{name}.")
        module = make(entry["kind"], dict(entry["settings"]))
        shared = dict(entry.get("shared", {}))
        for path, source in shared.items():
            self.share(module, path, self.made[source])
        found = module.load_state_dict({key: value.clone() for key, value in values.items()}, strict=False, assign=True)
        lost = [key for key in found.missing_keys if not _below(key, shared)]
        twice = [key for key in values if _below(key, shared)]
        if lost or twice or found.unexpected_keys:
            raise ExitsError(f"exits: {name} lacks {lost} and must not hold {[*found.unexpected_keys, *twice]}")
        for key, value in values.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ExitsError(f"exits: {name}.{key} holds NaN or infinity")
        self.used |= {f"{name}.{key}" for key in values}
        self.made |= {f"{name}.{path}" if path else name: part for path, part in module.named_modules()}
        return module

    @staticmethod
    def share(module: nn.Module, path: str, other: nn.Module) -> None:
        """Put `other` in the place of the part at `path`, which must be alike."""
        parent, _, name = path.rpartition(".")
        own = module.get_submodule(path)
        shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (own, other)]
        if not path or type(own) is not type(other) or shapes[0] != shapes[1]:
            raise ExitsError(f"exits: the part {path!r} of a head is another kind or size than the one it is shared with")
        setattr(module.get_submodule(parent), name, other)


def _head(kind: str, settings: dict[str, Any]) -> SampleHead:
    if kind not in HEADS:
        raise ExitsError(f"exits: head must be one of {', '.join(HEADS)}, got {kind!r}")
    return HEADS[kind](**settings)


def prepared(exits: SampleExits, device: torch.device, dtype: torch.dtype) -> SampleExits:
    """A copy with heads in the model's device and dtype, judges in fp32; the same object where nothing has to change."""
    tensors = [*exits.parameters(), *exits.buffers()]
    judged = {id(p) for e in exits if e.judge is not None for p in e.judge.parameters()}
    fits = all(
        t.device == device and (not t.is_floating_point() or t.dtype == (torch.float32 if id(t) in judged else dtype))
        for t in tensors
    )
    if fits:
        return exits
    other = copy.deepcopy(exits).to(device)
    for point in other:
        point.head.to(dtype)
    if other.final is not None:
        other.final.to(dtype)
    for point in other:
        if point.judge is not None:
            point.judge.float()
            # deepcopy copied the criterion's module and the registered one as one object, so this is the same module.
    return other
