"""`make bench-gpu`: microseconds, GB/s and share of a copy roof measured in the same run, per op, case and provider.

Times are medians over CUDA-graph replays with the L2 cache flushed before each, so neither launches nor warm caches
flatter anybody. Answers are checked first. Writes build/bench_gpu.json.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import DTYPES, refuse_wrong_answers

from dyndepth import ops  # noqa: F401  (registers the ops)
from dyndepth.files import replacing
from dyndepth.op import REGISTRY, backend
from dyndepth.plan.of_call import of_call
from dyndepth.testing import CASES, Case

_REPLAYS = 50


def flush() -> Callable[[], Any]:
    """Writes more than any L2 holds."""
    ballast = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    return ballast.zero_


def replay_us(call: Callable[[], Any], clear: Callable[[], Any]) -> list[float]:
    """Microseconds of single replays of a graph of `call`, cold. The launch of the graph is in it."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(_REPLAYS):
        clear()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)


def empty_graph_us(clear: Callable[[], Any]) -> float:
    """What events and an (almost) empty graph cost: a one-element kernel."""
    one = torch.zeros(1, device="cuda")
    return statistics.median(replay_us(lambda: one.add_(1), clear))


def copy_roof(clear: Callable[[], Any]) -> float:
    """Bytes per second of a 2 GiB copy, read and write counted."""
    source = torch.empty(2**31, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (statistics.median(replay_us(lambda: target.copy_(source), clear)) * 1e-6)


def entry(
    op: str, case: str, dtype: torch.dtype, provider: str, arguments: dict[str, Any], times: list[float], roof: float
) -> dict[str, Any]:
    """One row of the report. `times`: microseconds in rising order; roof: bytes per second.

    bytes, flops: the planner's of the whole call, whichever kernels it starts: the fewest bytes that must be moved, and two
    FLOPs per multiply-add of products and attention. It has no figures for `accept_drafts`, whose bytes are `moved` of its
    benchmark and whose FLOPs are None.
    """
    median = statistics.median(times)
    flops: int | None = None
    if op == "accept_drafts":
        size = importlib.import_module(f"bench_{op}").moved(arguments)
    else:
        traffic = of_call(op, arguments)
        size, flops = traffic.bytes, traffic.flops
    rate = size / (median * 1e-6)
    return {
        "op": op,
        "case": case,
        "dtype": str(dtype).removeprefix("torch."),
        "provider": provider,
        "median_us": median,
        "p90_us": times[int(0.9 * len(times))],
        "bytes": size,
        "flops": flops,
        "bytes_per_s": rate,
        "flops_per_s": None if flops is None else flops / (median * 1e-6),
        "share_of_copy_roof": rate / roof,
    }


def measure(
    device: str, timed: Callable[[Callable[[], Any]], list[float]], roof: float, wanted: Callable[[str, Case], bool]
) -> Iterator[dict[str, Any]]:
    """A row per op, case and provider, GPU providers and the reference, as soon as it is there; wrong answers raise."""
    for op in sorted(REGISTRY):
        dtype = DTYPES.get(op, [torch.bfloat16])[-1]
        for case in [case for case in CASES[op] if wanted(op, case)]:
            for provider in REGISTRY[op].providers:
                if provider == "cpp" or REGISTRY[op].providers[provider].missing() is not None:
                    continue
                arguments = case.build(dtype, device)
                refuse_wrong_answers(op, arguments, provider)
                with backend(provider):
                    try:
                        times = timed(lambda op=op, arguments=arguments: REGISTRY[op](**arguments))  # type: ignore[misc]
                    except RuntimeError as error:  # the reference may not be capturable
                        print(f"{op:<17}{case.name:<18}{provider:<9} cannot be captured: {str(error).splitlines()[0][:60]}")
                        continue
                yield entry(op, case.name, dtype, provider, arguments, times, roof)


def main() -> None:
    torch.set_grad_enabled(False)
    if not torch.cuda.is_available():
        sys.exit("bench-gpu: torch sees no CUDA device")
    clear = flush()
    roof, floor = copy_roof(clear), empty_graph_us(clear)
    name = torch.cuda.get_device_name()
    print(f"{name}: copy roof {roof / 1e12:.2f} TB/s; an almost empty graph takes {floor:.1f} us (not subtracted)")
    print(
        f"{'op':<17}{'case':<18}{'provider':<9}{'median us':>10}{'p90 us':>9}{'KiB':>10}{'GB/s':>8}{'GFLOP/s':>9}{'of roof':>9}"
    )
    rows = []
    for row in measure("cuda", lambda call: replay_us(call, clear), roof, lambda _, case: case.bench):
        rows.append(row)
        products = "" if row["flops_per_s"] is None else f"{row['flops_per_s'] / 1e9:.0f}"
        print(
            f"{row['op']:<17}{row['case']:<18}{row['provider']:<9}{row['median_us']:>10.1f}{row['p90_us']:>9.1f}"
            f"{row['bytes'] / 1024:>10.0f}{row['bytes_per_s'] / 1e9:>8.0f}{products:>9}{row['share_of_copy_roof']:>9.1%}"
        )
    result = {"device": name, "torch": torch.__version__, "copy_roof_bytes_per_s": roof, "empty_graph_us": floor, "rows": rows}
    with replacing(Path("build") / "bench_gpu.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
