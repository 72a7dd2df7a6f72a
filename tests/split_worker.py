"""The other process of tests/test_split.py: serves the upper layers of small encoders, one link after the other.

python split_worker.py tcp  THREADS PORT patience entropy ...      each name is one connection
python split_worker.py gloo THREADS PORT patience

THREADS are those of the test: a bit of PyTorch's attention may depend on how many share its work.
"""

from __future__ import annotations

import functools
import sys

import torch
import transformers as t

from dyndepth.encoders import (
    DynamicEncoder,
    LambdaHead,
    LinearHead,
    PonderDraw,
    QExit,
    SampleExit,
    SampleExits,
    facts_of,
)
from dyndepth.exits import Entropy, FixedDepth, Patience, Saturation
from dyndepth.exits.criteria import Criterion
from dyndepth.split import GlooLink, SplitServer, TcpLink

LAYERS, WIDTH, CLASSES, BOUNDARY = 5, 24, 3, 3
#: Name -> threshold at which some samples leave at every exit, some below and some above the boundary.
THRESHOLDS = {"patience": 1.0, "entropy": -0.3, "saturation": 0.3, "q_exit": 0.6, "ponder": 0.0, "depth": 0.0, "other": -0.3}
SECONDS = 300.0


def _criterion(name: str) -> Criterion:
    torch.manual_seed(5)
    judge = LambdaHead(WIDTH, 10)
    for parameter in judge.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    plain: dict[str, Criterion] = {
        "patience": Patience(), "entropy": Entropy(), "saturation": Saturation(), "q_exit": QExit(module=judge),
        "ponder": PonderDraw(module=judge, seed=4), "depth": FixedDepth(), "other": Entropy(),
    }  # fmt: skip
    return plain[name]


@functools.cache
def encoder(name: str, layout: str = "auto") -> DynamicEncoder:
    """The same in every process; "other" has exits of its own."""
    torch.manual_seed(7)
    config = t.BertConfig(
        vocab_size=61,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=40,
        num_labels=CLASSES,
    )
    model = t.BertForSequenceClassification(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.25 if parameter.dim() > 1 else 0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.data += 1
    heads = []
    for number in range(4):
        head = LinearHead(WIDTH, CLASSES, dense=number % 2 == 0)
        head.out.weight.data = torch.randn_like(head.out.weight)
        if heads:
            head.out.weight.data = heads[0].out.weight.data + 0.3 * head.out.weight.data
        heads.append(head)
    leaves = (1, 2, 4) if name == "other" else (1, 2, 3, 4)
    points = [SampleExit(at, heads[at - 1], _criterion(name), THRESHOLDS[name]) for at in leaves]
    return DynamicEncoder(model, SampleExits(points, facts_of(model)), layout=layout)


def inputs(lengths: list[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(3, 61, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def main() -> None:
    kind, threads, port, *names = sys.argv[1:]
    torch.set_num_threads(int(threads))
    if kind == "gloo":
        for name in names:
            SplitServer(encoder(name), BOUNDARY, GlooLink(1, int(port), timeout=SECONDS), timeout=SECONDS, idle=SECONDS).serve()
    else:
        for name in names:
            link = TcpLink.connect("127.0.0.1", int(port), SECONDS)
            SplitServer(encoder(name), BOUNDARY, link, timeout=SECONDS, idle=SECONDS).serve()


if __name__ == "__main__":
    main()
