"""CTC decoding: against every path there is, against a search written with dictionaries, and never against itself."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch

from dyndepth.encoders import SentencePosterior
from dyndepth.encoders.ctc import beam_search, ctc_losses, greedy
from dyndepth.errors import ArgumentError, ExitsError


def collapsed(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != blank)


def every_path(logits: torch.Tensor, blank: int = 0) -> dict[tuple[int, ...], float]:
    """Probability of every text: all V^T paths, one by one."""
    p = torch.softmax(logits.double(), -1)
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        found[collapsed(path, blank)] += math.prod(float(p[t, symbol]) for t, symbol in enumerate(path))
    return dict(found)


def by_dictionary(logits: torch.Tensor, beam: int, blank: int = 0) -> list[tuple[tuple[int, ...], float]]:
    """Prefix beam search of one sample, texts as tuples in a dictionary, probabilities instead of logarithms."""
    p = torch.softmax(logits.double(), -1)
    beams = {(): (1.0, 0.0)}
    for frame in p.tolist():
        grown: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for text, (in_blank, in_symbol) in beams.items():
            grown[text][0] += (in_blank + in_symbol) * frame[blank]
            for symbol, chance in enumerate(frame):
                if symbol == blank:
                    continue
                if text and symbol == text[-1]:
                    grown[text][1] += in_symbol * chance
                    grown[(*text, symbol)][1] += in_blank * chance
                else:
                    grown[(*text, symbol)][1] += (in_blank + in_symbol) * chance
        best = sorted(grown.items(), key=lambda item: -sum(item[1]))[:beam]
        beams = {text: (a, b) for text, (a, b) in best if a + b > 0}
    return [(text, sum(chances)) for text, chances in beams.items()]


def ragged(lengths: list[int], symbols: int, seed: int = 0, sharp: float = 1.5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, symbols, generator=generator) * sharp for length in lengths]


@pytest.mark.parametrize("blank", [0, 2])
def test_wide_search_is_exact(blank: int) -> None:
    """With room for every prefix, scores are the sums over all paths, repeats and blanks included."""
    parts = ragged([1, 5, 3, 6], 3)
    found = beam_search(torch.cat(parts), torch.tensor([1, 5, 3, 6]), beam=200, blank=blank)
    for row, part in enumerate(parts):
        wanted = every_path(part, blank)
        assert {tuple(text) for text in found.texts[row]} == {text for text, p in wanted.items() if p > 0}
        for text, score in zip(found.texts[row], found.scores[row].tolist(), strict=False):
            assert math.exp(score) == pytest.approx(wanted[tuple(text)], rel=1e-5)
        assert math.exp(float(torch.logsumexp(found.scores[row], 0))) == pytest.approx(1.0, rel=1e-5)
        assert found.scores[row].tolist() == sorted(found.scores[row].tolist(), reverse=True)
        assert bool((found.scores[row, len(wanted) :] == -torch.inf).all())


@pytest.mark.parametrize("sharp", [0.3, 2.0])
@pytest.mark.parametrize("beam", [1, 2, 7, 16])
def test_narrow_search_keeps_what_a_dictionary_keeps(beam: int, sharp: float) -> None:
    """Prefixes that are dropped, come back and grow into one another: flat probabilities make many."""
    lengths = [1, 12, 30, 7, 30]
    parts = ragged(lengths, 6, seed=2, sharp=sharp)
    found = beam_search(torch.cat(parts), torch.tensor(lengths), beam=beam)
    for row, part in enumerate(parts):
        wanted = by_dictionary(part, beam)
        assert [tuple(text) for text in found.texts[row]] == [text for text, _ in wanted]
        for score, (_, chance) in zip(found.scores[row].tolist(), wanted, strict=False):
            assert score == pytest.approx(math.log(chance), abs=1e-4)


def test_samples_do_not_see_each_other() -> None:
    lengths = [4, 9, 1, 6]
    parts = ragged(lengths, 5, seed=3)
    whole = beam_search(torch.cat(parts), torch.tensor(lengths), beam=5)
    for row, part in enumerate(parts):
        own = beam_search(part, torch.tensor([lengths[row]]), beam=5)
        assert own.texts[0] == whole.texts[row]
        assert torch.equal(own.scores[0], whole.scores[row])


def test_greedy_by_hand() -> None:
    paths = [[0, 3, 3, 0, 3, 1], [0, 0], [2], [1, 1, 0, 0, 2, 2]]
    logits = torch.nn.functional.one_hot(torch.tensor([symbol for path in paths for symbol in path]), 4).float()
    assert greedy(logits, torch.tensor([6, 2, 1, 6])) == [[3, 3, 1], [], [2], [1, 2]]
    assert greedy(logits, torch.tensor([6, 2, 1, 6]), blank=3) == [[0, 0, 1], [0], [2], [1, 0, 2]]


def test_a_sure_sample_has_one_sentence() -> None:
    """The posterior is 1 where one path has all the probability; two equal texts share it."""
    sure = torch.tensor([[0.0, 90.0, 0.0], [90.0, 0.0, 0.0]])
    even = torch.tensor([[-90.0, 5.0, 5.0], [90.0, 0.0, 0.0]])
    found = beam_search(torch.cat([sure, even]), torch.tensor([2, 2]), beam=4)
    assert found.posterior().tolist() == pytest.approx([1.0, 0.5])
    assert found.texts[0][0] == [1]
    assert sorted(found.texts[1][:2]) == [[1], [2]]


def test_posterior_of_every_text() -> None:
    parts = ragged([4, 5], 3, seed=5)
    for beam in (2, 5, 300):
        found = beam_search(torch.cat(parts), torch.tensor([4, 5]), beam=beam)
        for row, part in enumerate(parts):
            if beam == 300:
                chances = every_path(part).values()
                assert float(found.posterior()[row]) == pytest.approx(max(chances) / sum(chances), rel=1e-5)
            wanted = [chance for _, chance in by_dictionary(part, beam)]
            assert float(found.posterior()[row]) == pytest.approx(wanted[0] / sum(wanted), rel=1e-5)


def test_losses_are_the_texts_probabilities() -> None:
    parts = ragged([4, 5, 2], 3, seed=6)
    texts = [[1, 1], [2], [1, 1]]
    logits = torch.cat(parts)
    losses = ctc_losses(logits, torch.tensor([4, 5, 2]), [torch.tensor(text) for text in texts])
    for row in range(2):
        assert float(losses[row]) == pytest.approx(-math.log(every_path(parts[row])[tuple(texts[row])]), rel=1e-5)
    assert float(losses[2]) == math.inf, "two equal symbols need three frames"
    again = ctc_losses(logits, torch.tensor([4, 5, 2]), [torch.tensor(text) for text in texts], zero_infinity=True)
    assert again.tolist() == [*losses[:2].tolist(), 0.0]


def test_bad_input() -> None:
    logits = torch.zeros(5, 3)
    with pytest.raises(ArgumentError, match="beam must be at least 1, got 0"):
        beam_search(logits, torch.tensor([5]), beam=0)
    with pytest.raises(ArgumentError, match=r"logits must be \[4, V\], got \[5, 3\]"):
        beam_search(logits, torch.tensor([4]))
    with pytest.raises(ArgumentError, match=r"logits must be"):
        beam_search(logits, torch.tensor([5, 0]))
    with pytest.raises(ArgumentError, match="blank must be below 3, got 3"):
        beam_search(logits, torch.tensor([5]), blank=3)
    with pytest.raises(ExitsError, match="beam must be at least 2"):
        SentencePosterior(beam=1)
