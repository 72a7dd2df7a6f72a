"""SpecExit: the rule by hand, rows that decide for themselves, the same in both runtimes; a probe and its labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
import transformers
from torch import Tensor

import dyndepth
from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.recipes import specexit
from dyndepth.recipes.specexit import Answer, Probe, Rule, Stop, Trace
from dyndepth.recipes.specexit_probe import _features, _labels

END, BEGIN, STEP = 7, 8, 9
WORDS = tiny_models.VOCABULARY


def signals_of(column: int = 0) -> specexit.Signals:
    """Signals that stand in the logits themselves: columns 0, 1, 2."""

    def signals(logits: Tensor, made: Tensor) -> Tensor:
        return logits[:, column : column + 3]

    return signals


def logits(*rows: tuple[float, float, float]) -> Tensor:
    out = torch.full((len(rows), 12), -1.0)
    out[:, :3] = torch.tensor(rows)
    return out


def fed(answer: Answer, prompts: Tensor, tokens: list[list[int]], seen: list[list[tuple[float, float, float]]]) -> list[Tensor]:
    """What the processor makes of logits, given the tokens chosen after each."""
    ids, found = prompts, []
    for step, rows in enumerate(seen):
        found.append(answer(ids, logits(*rows)))
        ids = torch.cat([ids, torch.tensor([row[step : step + 1] for row in tokens])], dim=1)
    return found


GOOD, BAD = (0.9, 0.5, 100.0), (0.1, 0.5, 100.0)


def test_the_rule_by_hand() -> None:
    """The first signal is taken whole, then a tenth of each: 0.9 -> 0.82 -> 0.748 with 0.1; bounds are exclusive."""
    rule = Rule()
    now = torch.full((1, 3), torch.nan)
    for signal, wanted in (((0.9, 0.2, 300.0), (0.9, 0.2, 300.0)), ((0.1, 1.0, 100.0), (0.82, 0.28, 280.0))):
        now = rule.smoothed(now, torch.tensor([signal]))
        assert now[0].tolist() == pytest.approx(wanted)
    assert now[0].tolist() == pytest.approx([0.82, 0.28, 280.0])
    cases = {
        (0.81, 0.31, 199.0): True, (0.8, 0.31, 199.0): False, (0.81, 0.3, 199.0): False, (0.81, 0.31, 200.0): False,
        (torch.nan,) * 3: False,
    }  # fmt: skip
    for smoothed, holds in cases.items():
        assert rule.holds(torch.tensor([smoothed], dtype=torch.float64)).item() == holds, smoothed
    with pytest.raises(ArgumentError, match=r"alpha must be in \(0, 1\], got 0"):
        Rule(alpha=0)


def test_the_rule_is_asked_at_step_ends_only() -> None:
    """Row 0 ends a step after two tokens and is stopped, row 1 is unsure there, row 2 is sure but ends no step."""
    answer = Answer(signals_of(), [STEP], END)
    tokens = [[3, STEP, 4], [3, STEP, 4], [3, 4, 5]]
    found = fed(answer, torch.full((3, 2), 3), tokens, [[GOOD, BAD, GOOD]] * 3)
    assert torch.equal(found[0], logits(GOOD, BAD, GOOD)), "nothing is changed before a step ends"
    assert torch.equal(found[1], logits(GOOD, BAD, GOOD))
    assert found[2][0].argmax() == END
    assert found[2][0].exp().sum() == 1
    assert torch.equal(found[2][1:], logits(BAD, GOOD))
    assert answer.stopped.tolist() == [2, -1, -1]
    assert answer.thinking.tolist() == [False, True, True]


def test_a_signal_counts_from_the_token_that_it_chose() -> None:
    """Logits after a separator say nothing about that separator; those that chose it do."""
    answer = Answer(signals_of(), [STEP], END, rule=Rule(alpha=1.0))
    found = fed(answer, torch.full((2, 1), 3), [[3, STEP, 3], [3, STEP, 3]], [[GOOD, BAD], [BAD, GOOD], [GOOD, BAD]])
    assert [int(row.argmax()) == END for row in found[2]] == [False, True]


def test_who_has_ended_is_not_judged() -> None:
    """After the model's own end, and after one that was put there; `begin` starts a row again, with nothing seen."""
    tokens = [[END, STEP, 3, 3, 3, 3], [STEP, END, BEGIN, STEP, 3, 3], [STEP, END, STEP, 3, 3, 3]]
    plain = Answer(signals_of(), [STEP], END)
    found = fed(plain, torch.full((3, 1), 3), tokens, [[GOOD] * 3] * 6)
    assert [[int(row[0].isinf()) for row in step] for step in found] == [[0] * 3, [0, 1, 1]] + [[0] * 3] * 4
    again = Answer(signals_of(), [STEP], END, begin=BEGIN)
    prompts = torch.tensor([[BEGIN, 3], [3, BEGIN], [BEGIN, END]])
    found = fed(again, prompts, tokens, [[GOOD] * 3] * 6)
    assert [[int(row[0].isinf()) for row in step] for step in found] == [[0] * 3, [0, 1, 0]] + [[0] * 3] * 2 + [
        [0, 1, 0],
        [0] * 3,
    ]
    assert bool(again.smoothed[2].isnan().all())


def test_thinking_again_starts_afresh() -> None:
    """Doubts of the first thoughts do not weigh on the second ones; a prompt that never began is not judged."""
    tokens = [[3, END, BEGIN, 3, STEP, 3], [3, STEP, 3, 3, STEP, 3]]
    answer = Answer(signals_of(), [STEP], END, begin=BEGIN)
    found = fed(answer, torch.tensor([[3, BEGIN], [3, 3]]), tokens, [[BAD, GOOD]] * 3 + [[GOOD, GOOD]] * 3)
    assert [[int(row[0].isinf()) for row in step] for step in found] == [[0, 0]] * 5 + [[1, 0]]


def test_signals_are_told_how_many_tokens_were_made() -> None:
    """Both plugs: none before the first new token is chosen."""
    seen: list[list[int]] = []

    def signals(logits: Tensor, made: Tensor) -> Tensor:
        seen.append(made.tolist())
        return logits[:, :3]

    fed(Answer(signals, [STEP], END), torch.full((2, 3), 3), [[3] * 3] * 2, [[BAD, BAD]] * 3)
    stop, ids = Stop(signals, [STEP], END), torch.full((2, 3), 3)
    for made in range(1, 4):
        stop(torch.cat([ids, ids[:, :made]], dim=1), (logits(BAD, BAD),) * made)
    assert seen == [[0, 0], [1, 1], [2, 2]] * 2


def test_a_prompt_that_ends_like_a_step_is_no_step() -> None:
    answer = Answer(signals_of(), [STEP], END)
    assert torch.equal(answer(torch.tensor([[3, STEP]]), logits(GOOD)), logits(GOOD))


def test_other_sequences_start_anew() -> None:
    """The same prompt again, a shorter one, another batch: nothing of the last call is left."""
    answer = Answer(signals_of(), [STEP], END)
    for prompts in (torch.full((1, 4), 3), torch.full((1, 4), 3), torch.full((1, 2), 3), torch.full((2, 3), 3)):
        answer(prompts, logits(*[BAD] * len(prompts)))
        torch.testing.assert_close(answer.smoothed, torch.tensor([BAD] * len(prompts)))
        answer(torch.cat([prompts, prompts[:, :1]], dim=1), logits(*[GOOD] * len(prompts)))
        assert answer.smoothed[:, 0].tolist() == pytest.approx([0.18] * len(prompts))


def test_rows_do_not_see_each_other() -> None:
    """Alone, together and in another order: the same bits and the same tokens after which rows stop."""
    generator = torch.Generator().manual_seed(2)
    batch, length = 9, 60
    seen = torch.rand(length, batch, 3, generator=generator) * torch.tensor([1.0, 1.0, 400.0])
    tokens = torch.randint(3, 12, (batch, length), generator=generator)
    prompts = torch.randint(10, 12, (batch, 4), generator=generator)
    rule = Rule(confidence=0.5, progress=0.45, remain=210)

    def run(rows: list[int]) -> tuple[Tensor, Tensor]:
        answer = Answer(signals_of(), [STEP], END, begin=BEGIN, rule=rule)
        answer_of = fed(
            answer, prompts[rows], tokens[rows].tolist(), [[tuple(r) for r in step[rows].tolist()] for step in seen]
        )
        assert len(answer_of) == length
        return answer.smoothed, answer.stopped

    smoothed, stopped = run(list(range(batch)))
    assert 1 < int((stopped >= 0).sum()) < batch
    for rows in ([8, 3, 0, 5, 1, 7, 2, 6, 4], [2, 6], *([row] for row in range(batch))):
        mine, when = run(rows)
        assert torch.equal(mine.nan_to_num(-1), smoothed[rows].nan_to_num(-1))
        assert torch.equal(when, stopped[rows])


# -- in generation --------------------------------------------------------------------------------------------------------


def random_probe(seed: int = 2, words: int = 40) -> Probe:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(WORDS, generator=generator)[:words]
    bias = torch.tensor([0.0, 0.0, 5.0])
    return Probe(chosen, END, 0.01 * torch.randn(3, words + 6, generator=generator), bias)


#: Half of the vocabulary ends steps, so that a random model meets some.
STEPS = range(10, WORDS, 2)
EASY = Rule(confidence=0.63, progress=0.64, remain=400.0, alpha=0.3)
OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}


def answered(name: str = "llama", **more: Any) -> tuple[Any, Answer]:
    answer = Answer(random_probe(), STEPS, END, rule=more.pop("rule", EASY))
    rows = more.pop("rows", list(range(6)))
    inputs = {key: value[rows] for key, value in tiny_models.prompts(6).items()}
    out = tiny_models.shared(name).generate(**inputs, logits_processor=[answer], **OPTIONS, **more)
    return out, answer


def test_both_runtimes_stop_alike() -> None:
    """Tokens, and after how many of them each row was stopped; the token after the step is `end`."""
    theirs, their = answered()
    ours, our = answered(custom_generate=dyndepth.generate)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(our.stopped, their.stopped)
    assert int((our.stopped >= 0).sum()) > 1
    assert len(our.stopped.unique()) > 2
    going = ~(ours.sequences == 2).any(1)  # what comes after a row's end is the runtime's own
    torch.testing.assert_close(our.smoothed[going], their.smoothed[going], rtol=1e-3, atol=1e-3)
    width = tiny_models.prompts(6)["input_ids"].shape[1]
    for row, made in enumerate(our.stopped.tolist()):
        if made >= 0:
            assert ours.sequences[row, width + made] == END
            assert int(ours.sequences[row, width + made - 1]) in STEPS


@pytest.mark.parametrize("dynamic", [False, True])
def test_neighbours_and_order_do_not_matter(dynamic: bool) -> None:
    """Rows of a batch, some of which leave layers early, against the same rows alone and in another order."""
    more: dict[str, Any] = {"custom_generate": dyndepth.generate}
    if dynamic:
        more |= {"exits": tiny_exits.mixed(tiny_models.shared("llama")), "rule": Rule(0.5, 0.45, 300.0, 0.3)}
    whole, watch = answered(**more)
    assert int((watch.stopped >= 0).sum()) > 1
    for rows in ([5, 2, 0, 4, 1, 3], [3], [1, 4]):
        out, mine = answered(rows=rows, **more)
        assert torch.equal(mine.stopped, watch.stopped[rows])
        made = out.sequences.shape[1]
        assert torch.equal(out.sequences, whole.sequences[rows][:, :made])
        going = ~(out.sequences == 2).any(1)
        torch.testing.assert_close(mine.smoothed[going], watch.smoothed[rows][going], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("custom", [None, dyndepth.generate], ids=["transformers", "dyndepth"])
def test_stop_ends_where_answer_answers(custom: Any) -> None:
    """Greedy: the same decisions from scores; then only padding."""
    whole, answer = answered(custom_generate=custom)
    stop = Stop(random_probe(), STEPS, END, rule=EASY)
    out = tiny_models.shared("llama").generate(
        **tiny_models.prompts(6), stopping_criteria=[stop], custom_generate=custom, output_scores=True, **OPTIONS
    )
    width = tiny_models.prompts(6)["input_ids"].shape[1]
    assert torch.equal(stop.stopped, answer.stopped)
    assert int((stop.stopped >= 0).sum()) > 1
    for row, made in enumerate(stop.stopped.tolist()):
        if made >= 0:
            assert torch.equal(out.sequences[row, : width + made], whole.sequences[row, : width + made])
            assert not out.sequences[row, width + made :].any()


def test_end_of_sequence_as_the_end() -> None:
    """With the end-of-sequence token for `end` a row that stops makes nothing more and gives its pages back."""
    answer = Answer(random_probe(), STEPS, 2, rule=EASY)
    out = tiny_models.shared("llama").generate(
        **tiny_models.prompts(6), logits_processor=[answer], custom_generate=dyndepth.generate, **OPTIONS
    )
    width = tiny_models.prompts(6)["input_ids"].shape[1]
    assert int((answer.stopped >= 0).sum()) > 1
    for row, made in enumerate(answer.stopped.tolist()):
        if made >= 0:
            assert out.sequences[row, width + made] == 2
            assert (out.exit_layers[row, made + 1 :] == -1).all()


def test_drafts_are_refused() -> None:
    """A lossless run would show it drafts and verified tokens of all rows in turn."""
    model = tiny_models.shared("llama")
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 3, 6))
    options = OPTIONS | {"custom_generate": dyndepth.generate, "exits": exits, "mode": "lossless"}
    for plug in (
        {"logits_processor": [Answer(random_probe(), STEPS, END)]}, {"stopping_criteria": [Stop(random_probe(), STEPS, END)]},
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=r"(Answer|Stop) follows the rows of a batch token by token"):
            model.generate(**tiny_models.prompts(2), **options, **plug)


def test_what_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"specexit\.Stop: wanted scores \(output_scores=True"):
        tiny_models.shared("llama").generate(
            **tiny_models.prompts(2), stopping_criteria=[Stop(random_probe(), STEPS, END)], **OPTIONS
        )
    with pytest.raises(ArgumentError, match="at least one separator token, got none"):
        Answer(random_probe(), [], END)
    with pytest.raises(ArgumentError, match="end must be a token id and no separator, got 9"):
        Answer(random_probe(), [STEP], STEP)
    with pytest.raises(ArgumentError, match=r"weight must be \[3, 8\] and bias \[3\], got \[3, 7\], \[3\]"):
        Probe(torch.tensor([1, 2]), END, torch.zeros(3, 7))
    with pytest.raises(NotEnoughDataError, match="at least two traces that end, got 0"):
        specexit.fit(tiny_models.shared("llama"), [], [STEP])
    mixed = [Trace(torch.tensor([3, 4, end]), 1, 2) for end in (5, 6)]
    with pytest.raises(ArgumentError, match=r"traces must end with one token, got \[5, 6\]"):
        specexit.fit(tiny_models.shared("llama"), mixed, [STEP])


class _Tokenizer:
    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return {"\n\n": [5], ".\n\n": [9], " \n\n": [5]}.get(text, [1, 2])


def test_separators() -> None:
    assert specexit.separators(_Tokenizer()) == [5, 9]
    with pytest.raises(ArgumentError, match=r"none of .*x.* is one token"):
        specexit.separators(_Tokenizer(), ["x"])


# -- the probe ------------------------------------------------------------------------------------------------------------


def test_a_probe_by_hand(tmp_path: Path) -> None:
    """Two words: their log-probabilities, four statistics, that of `end`, log(1 + made); -inf counts as -50."""
    x = torch.tensor([[2.0, 1.0, 0.0, -torch.inf], [0.0, 0.0, 0.0, 0.0]])
    probe = Probe(torch.tensor([1, 3]), 2)
    found = probe.features(x, torch.tensor([0, 3]))
    p = torch.softmax(x, -1)
    log_p = p.log().clamp_min(-50)
    top = p.sort(descending=True).values
    entropy = -(p * log_p).sum(-1)
    wanted = torch.stack(
        [log_p[:, 1], log_p[:, 3], log_p[:, 2], torch.logit(top[:, 0]), top[:, 0], top[:, 0] - top[:, 1], entropy,
         torch.tensor([1.0, 4.0]).log()], dim=1,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted)
    assert probe(x, torch.tensor([0, 3])).tolist() == [[0.5, 0.5, 1.0]] * 2
    probe.weight[0, 0], probe.weight[1, 7], probe.weight[2, 2], probe.bias[2] = 1.0, 2.0, 3.0, 4.0
    said = probe(x, torch.tensor([0, 3]))
    torch.testing.assert_close(said[:, 0], torch.sigmoid(log_p[:, 1]))
    torch.testing.assert_close(said[:, 1], torch.sigmoid(2 * torch.tensor([1.0, 4.0]).log()))
    torch.testing.assert_close(said[:, 2], torch.exp(3 * log_p[:, 2] + 4))
    probe.save(tmp_path / "probe.safetensors")
    assert torch.equal(Probe.load(tmp_path / "probe.safetensors")(x, torch.tensor([0, 3])), said)
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(ArgumentError, match="is no probe"):
        Probe.load(tmp_path / "other")


def sequence(length: int, steps: list[int], seed: int, prompt: int = 4) -> Trace:
    tokens = torch.randint(10, WORDS, (prompt + length + 1,), generator=torch.Generator().manual_seed(seed))
    tokens[[prompt + at for at in steps]] = STEP
    tokens[-1] = END
    return Trace(tokens, prompt, prompt + length)


def test_labels_by_hand() -> None:
    """Thought k of 6 is k / 6 done with 6 - k to come; a step's confidence is of transformers' own answer forced there."""
    model = tiny_models.shared("llama")
    trace = sequence(6, [1, 3], 5)
    (found,) = _labels(model, [trace], {STEP}, 8, 3, 2)
    assert found[:, 1].tolist() == pytest.approx([k / 6 for k in range(1, 7)])
    assert found[:, 2].tolist() == [5, 4, 3, 2, 1, 0]
    wanted = []
    for at in (2, 4, 6):
        ids, logs = torch.cat([trace.tokens[: 4 + at], torch.tensor([END])]), []
        for _ in range(3):
            best = model(ids[None]).logits[0, -1].log_softmax(-1).max(-1)
            logs.append(best.values)
            ids = torch.cat([ids, best.indices[None]])
            if int(best.indices) == 2:
                break
        wanted += [float(torch.stack(logs).mean().exp())] * 2
    assert found[:, 0].tolist() == pytest.approx(wanted, rel=1e-4)
    # One answer for all steps: the one that the trace goes on to.
    (one,) = _labels(model, [trace], {STEP}, 1, 3, 2)
    assert one[:, 0].tolist() == pytest.approx(wanted[-1:] * 6, rel=1e-4)


def test_a_probe_learns() -> None:
    """Thoughts of about one length: how many were made tells progress and what remains, on traces it was not shown."""
    model = tiny_models.shared("llama")
    data = [sequence(30 + seed % 3, [9, 19], seed) for seed in range(15)]
    probe, found = specexit.fit(model, data, [STEP], words=20, answer_tokens=2)
    assert set(found) == {"confidence", "progress", "remain"}
    assert found["progress"]["error"] < 0.5 * found["progress"]["error_of_constant"]
    assert found["remain"]["error"] < 0.85 * found["remain"]["error_of_constant"]
    assert int(probe.end) == END
    held = data[4]
    scores = model(held.tokens[None]).logits[0, held.start - 1 : held.stop - 1]
    torch.testing.assert_close(
        _features(model, probe, held), probe.features(scores, torch.arange(len(scores))), rtol=1e-3, atol=1e-3
    )
    said = probe(scores, torch.arange(len(scores)))
    count = len(said)
    progress = torch.arange(1, count + 1) / count
    assert float((said[:, 1] - progress).abs().mean()) < 0.15
    other, _ = specexit.fit(model, data, [STEP], words=20, answer_tokens=2)
    assert torch.equal(other.weight, probe.weight)


def test_traces_are_the_models_own() -> None:
    """Up to the token that ends thinking; sequences that never make it, or make it at once, are left out."""
    model = tiny_models.shared("llama")
    prompts = [torch.arange(3, 5 + at) for at in range(8)]
    wanted = [model.generate(prompt[None], max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist() for prompt in prompts]
    end = max(range(3, WORDS), key=lambda token: sum(token in row[1:] and row[0] != token for row in wanted))
    found = specexit.traces(model, prompts, end=end, max_new_tokens=20, batch=3, do_sample=False)
    kept = [(prompt, row) for prompt, row in zip(prompts, wanted, strict=True) if end in row and row[0] != end]
    assert 0 < len(found) == len(kept)
    for trace, (prompt, row) in zip(found, kept, strict=True):
        stop = row.index(end)
        assert trace.tokens.tolist() == [*prompt.tolist(), *row[: stop + 1]]
        assert (trace.start, trace.stop) == (len(prompt), len(prompt) + stop)


def test_plugs_are_transformers_own_kinds() -> None:
    assert issubclass(Answer, transformers.LogitsProcessor)
    assert issubclass(Stop, transformers.StoppingCriteria)
