"""The op pattern: one contract, one reference, one fake, several ranked providers.

An op is registered once under `torch.ops.dyndepth`, so it works inside `torch.compile`, under FakeTensor and in other
people's graphs. At run time its Python kernel checks the arguments and picks a provider: the highest-ranked one whose
`why_not(arguments)` answers None. A provider's answer depends on the arguments and the hardware only, so the same call
takes the same path every time; `dyndepth info` prints the table of answers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from dyndepth import env
from dyndepth.errors import ArgumentError, BackendError

# Order in which providers are tried. The reference is last: it runs anywhere.
RANK = ("cuda", "triton", "cpp", "torch")

REGISTRY: dict[str, Op] = {}

_library = torch.library.Library("dyndepth", "DEF")
_forced: ContextVar[str | None] = ContextVar("dyndepth_backend", default=None)


@dataclass(frozen=True)
class Provider:
    """One implementation of an op."""

    name: str
    run: Callable[..., Any]
    #: Reason why it can never run on this machine (not built, not installed, no device), or None.
    missing: Callable[[], str | None]
    #: Reason why it cannot take these arguments, or None. Called with the op's arguments.
    declines: Callable[..., str | None]
    #: Module that is imported when it first runs, None when `run` is the implementation itself.
    module: str | None = None

    @functools.cached_property
    def absence(self) -> str | None:
        """`missing`, asked once: what is installed and plugged in stays so for a process."""
        return self.missing()

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        return self.absence or self.declines(*args, **kwargs)


def _never(*_args: Any, **_kwargs: Any) -> None:
    return None


class Op:
    """Contract (schema, checks, fake), reference and providers of one operation.

    `schema` follows the operator name as in `torch.library.Library.define`. `reference`, `fake` and `check` share its
    signature, defaults included (the dispatcher drops arguments equal to their defaults). `check` raises
    `dyndepth.errors.ArgumentError` and must not read values of tensors that are not on the CPU.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        check: Callable[..., None],
    ) -> None:
        self.name = name
        self.schema = schema
        self.reference = reference
        self.check = check
        self.providers: dict[str, Provider] = {"torch": Provider("torch", reference, _never, _never)}
        _library.define(name + schema)
        _library.impl(name, self._run, "CompositeExplicitAutograd")

        def checked_fake(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return fake(*args, **kwargs)

        torch.library.register_fake(f"dyndepth::{name}", checked_fake, lib=_library)
        self.overload = getattr(torch.ops.dyndepth, name).default
        arguments = self.overload._schema.arguments
        self._written = [at for at, given in enumerate(arguments) if given.alias_info and given.alias_info.is_write]
        REGISTRY[name] = self

    def provider(
        self,
        name: str,
        *,
        missing: Callable[[], str | None] = _never,
        declines: Callable[..., str | None] = _never,
        module: str | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator that adds an implementation; it takes the op's arguments after they passed `check`."""
        if name not in RANK:
            raise ValueError(f"provider name must be one of {RANK}, got {name!r}")

        def add(run: Callable[..., Any]) -> Callable[..., Any]:
            self.providers[name] = Provider(name, run, missing, declines, module)
            self.providers = {key: self.providers[key] for key in RANK if key in self.providers}
            return run

        return add

    def provider_in(
        self,
        name: str,
        module: str,
        *,
        missing: Callable[[], str | None] = _never,
        declines: Callable[..., str | None] = _never,
    ) -> None:
        """Add the implementation `module.<op name>`, imported when it first runs."""

        def run(*args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(module), self.name)(*args, **kwargs)

        self.provider(name, missing=missing, declines=declines, module=module)(run)

    def choose(self, *args: Any, **kwargs: Any) -> Provider:
        """The provider that a call with these arguments uses."""
        wanted = forced_providers(self.name)
        reasons = {}
        for name in wanted or self.providers:
            candidate = self.providers.get(name)
            reason = "this op has no such provider" if candidate is None else candidate.why_not(*args, **kwargs)
            if reason is None and candidate is not None:
                return candidate
            reasons[name] = reason
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise BackendError(f"{self.name}: no usable provider among those {'forced' if wanted else 'known'} ({listed})")

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self.check(*args, **kwargs)
        provider = self.choose(*args, **kwargs)
        device = args[0].device.type
        if torch.is_grad_enabled() or torch.is_autocast_enabled(device):
            # All providers answer alike: no dtype changes behind the contract's back, no graph of some of them only.
            with torch.no_grad(), torch.autocast(device, enabled=False):
                result = self._call(provider, args, kwargs)
        else:
            result = self._call(provider, args, kwargs)
        for at in self._written:
            # Autograd must notice if something it saved is overwritten; kernels write without telling it.
            if not args[at].is_inference():
                torch.autograd.graph.increment_version(args[at])
        return result

    def _call(self, provider: Provider, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return provider.run(*args, **kwargs)
        except RuntimeError as error:
            # C++ can only throw RuntimeError; its checks of values begin like ours, with the op's name.
            _, own, message = str(error).partition(f"{self.name}: ")
            if provider.name == "cpp" and own:
                raise ArgumentError(own + message.partition("\n")[0]) from None
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)


def forced_providers(op: str) -> tuple[str, ...] | None:
    """Providers the user allows for `op`, in order of preference, or None when nothing is forced."""
    choice, source = _forced.get(), "backend"
    if choice is None:
        choice, source = env.backend(), "DYNDEPTH_BACKEND"
    if choice is None:
        return None
    by_op = parse(choice, source)
    return by_op.get(op) or by_op.get("") or None


def cpp_allowed(*ops: str) -> bool:
    """Nobody forced another provider than cpp for one of the ops: code of C++ that stands for all of them may run."""
    if _forced.get() is None and env.backend() is None:
        return True
    return all((forced := forced_providers(op)) is None or forced[0] == "cpp" for op in ops)


@functools.lru_cache(maxsize=64)
def parse(choice: str, source: str) -> dict[str, tuple[str, ...]]:
    """Providers per op, those for all ops under ""; `BackendError` on a name that does not exist."""
    by_op: dict[str, tuple[str, ...]] = {}
    for part in choice.split(","):
        target, equals, name = (word.strip() for word in part.rpartition("="))
        if name not in RANK:
            raise BackendError(f"{source}: providers are {', '.join(RANK)}, got {name!r} in {choice!r}")
        if equals and target not in REGISTRY:
            raise BackendError(f"{source}: ops are {', '.join(sorted(REGISTRY))}, got {target!r} in {choice!r}")
        by_op[target] = (*by_op.get(target, ()), name)
    return by_op


@contextmanager
def backend(choice: str) -> Iterator[None]:
    """Force providers inside a `with` block.

    `choice` is a comma-separated list in order of preference: `"torch"` uses the reference everywhere, `"cpp,torch"` the
    first of the two that can run, `"exit_stats=torch"` forces one op and leaves the rest automatic;
    `"exit_stats=cpp,exit_stats=torch,torch"` is an order for one op and a choice for the others. A forced provider that
    cannot run raises `BackendError` with its reason. Holds for the current thread (context variable) and replaces the
    environment variable `DYNDEPTH_BACKEND`; inside `torch.compile`d code it has no effect, so enter it outside.
    """
    parse(choice, "backend")
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)
