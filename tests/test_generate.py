"""dyndepth.generate behind transformers' own front door: everything that is not beam search."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
import transformers as t

import dyndepth
from dyndepth.errors import ArgumentError, ExitsError, PagesFullError
from dyndepth.exits import Band, FixedDepth
from dyndepth.runtime.bind import Model
from dyndepth.runtime.output import DynamicDepthOutput
from dyndepth.runtime.stops import forbidden_words


def characters() -> Any:
    """A tokenizer with one letter per token of the tiny models."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {chr(0x21 + i if i < 90 else 0x100 + i): i for i in range(tiny_models.VOCABULARY)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    return t.PreTrainedTokenizerFast(tokenizer_object=letters)


MODEL = tiny_models.shared("llama")
INPUTS = tiny_models.prompts(6)


def both(**options: Any) -> tuple[Any, Any]:
    """transformers and dyndepth at full depth, with the same options and seeds."""
    settings = {"max_new_tokens": 10, "do_sample": False} | options
    torch.manual_seed(5)
    theirs = MODEL.generate(**INPUTS, **settings)
    torch.manual_seed(5)
    ours = MODEL.generate(**INPUTS, custom_generate=dyndepth.generate, **settings)
    return ours, theirs


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "min_p": 0.05, "typical_p": 0.9},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [9, 11]]},
        {"forced_eos_token_id": 5},
        {"suppress_tokens": [3, 4, 5]},
        {"min_new_tokens": 6, "eos_token_id": list(range(3, 100))},
        {"max_length": 17, "max_new_tokens": None},
        {"num_return_sequences": 3, "do_sample": True},
        {"use_cache": False},
        {"renormalize_logits": True, "exponential_decay_length_penalty": (3, 1.5)},
    ],
    ids=lambda options: "-".join(options),
)
def test_same_tokens_as_transformers(options: dict[str, Any]) -> None:
    ours, theirs = both(**options)
    assert torch.equal(ours, theirs)


class Longer(t.MinNewTokensLengthLogitsProcessor):
    """Forbids a word more than its base does."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return super().__call__(input_ids, scores).index_fill(1, torch.arange(40), -torch.inf)


@pytest.mark.parametrize("several", [True, False])
def test_only_rows_whose_best_word_is_forbidden_make_logits(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' tokens are the arg max; processors see the forbidden ones' scores alone, and only while they forbid."""
    free = both(max_new_tokens=9)[1][:, INPUTS["input_ids"].shape[1] :]
    ends = int(free[2, 3])  # the first row to stop at it will be asked for more
    words: Any = [ends, int(free[0, 5])] if several else ends
    rows: list[int] = []
    logits = Model.logits
    monkeypatch.setattr(Model, "logits", lambda model, ready: rows.append(len(ready)) or logits(model, ready))
    for options in (
        {"min_new_tokens": 7, "eos_token_id": words, "pad_token_id": 1},
        {"min_length": INPUTS["input_ids"].shape[1] + 7, "eos_token_id": words, "pad_token_id": 1},
        {"suppress_tokens": [ends], "begin_suppress_tokens": free[:, 0].tolist()},
    ):
        rows.clear()
        ours, theirs = both(max_new_tokens=9, **options)
        assert torch.equal(ours, theirs)
        assert 0 < sum(rows) < 0.7 * 9 * len(ours), "somebody's best word was forbidden, and not everybody's in every step"


def test_processors_of_a_kind_of_their_own_see_every_row() -> None:
    """One that derives from a known one may forbid more than it."""
    longer = t.LogitsProcessorList([Longer(INPUTS["input_ids"].shape[1], 3, 7)])
    ours, theirs = both(logits_processor=longer)
    assert torch.equal(ours, theirs)
    assert not bool((ours[:, INPUTS["input_ids"].shape[1] :] < 40).any())
    assert forbidden_words([t.MinLengthLogitsProcessor(3, [5, 6]), *longer]) is None
    assert forbidden_words([]).tolist() == []  # type: ignore[union-attr]
    assert forbidden_words([t.MinLengthLogitsProcessor(3, [5, 6])]).tolist() == [5, 6]  # type: ignore[union-attr]


def test_observers_are_told_the_best_word_whatever_is_forbidden() -> None:
    """What exits are judged by is what the model says, not what a caller lets it say."""
    free = both(max_new_tokens=2)[1][:, -2:]
    seen: list[Any] = []
    MODEL.generate(
        **INPUTS, custom_generate=dyndepth.generate, exits=tiny_exits.exits_of(MODEL, tiny_exits.band(MODEL, 3, 6)),
        observe=seen.append, kv="recompute", max_new_tokens=1, do_sample=False, suppress_tokens=free[:, 0].tolist(),
    )  # fmt: skip
    assert sum(len(told.seq) for told in seen) > 0, "somebody reached the top"
    for told in seen:
        assert torch.equal(told.full, free[told.seq, 0])


def test_scores_and_logits() -> None:
    ours, theirs = both(return_dict_in_generate=True, output_scores=True, output_logits=True, repetition_penalty=1.5)
    assert isinstance(ours, DynamicDepthOutput)
    assert isinstance(ours, t.generation.GenerateDecoderOnlyOutput)
    for step in range(len(theirs.scores)):
        alive = ours.exit_layers[:, step] >= 0
        torch.testing.assert_close(ours.scores[step][alive], theirs.scores[step][alive], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.logits[step][alive], theirs.logits[step][alive], rtol=1e-4, atol=1e-4)
        assert float(ours.logits[step][~alive].abs().sum()) == 0
    transition = MODEL.compute_transition_scores(ours.sequences, ours.scores)
    assert transition.shape == (6, 10)


@pytest.mark.parametrize("end", [None, list(range(3, 60))], ids=["to the end", "some end"])
def test_tokens_are_the_same_whoever_looks_at_logits(end: list[int] | None) -> None:
    """Where nobody does, they are not made."""
    plain, theirs = both(eos_token_id=end, pad_token_id=0)
    shown, _ = both(eos_token_id=end, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(plain, theirs)
    assert torch.equal(shown.sequences, theirs)
    assert end is None or 0 in plain[:, INPUTS["input_ids"].shape[1] :], "nobody ended early"


def test_own_processor_and_criteria() -> None:
    class Ban(t.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.index_fill(1, torch.arange(3, 120), -torch.inf)

    class AfterFour(t.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            long = input_ids.shape[1] >= INPUTS["input_ids"].shape[1] + 4
            return torch.tensor([long and row % 2 == 0 for row in range(len(input_ids))])

    ours, theirs = both(
        logits_processor=t.LogitsProcessorList([Ban()]), stopping_criteria=t.StoppingCriteriaList([AfterFour()]), eos_token_id=2
    )
    assert torch.equal(ours, theirs)


def test_prefix_constrained() -> None:
    ours, theirs = both(prefix_allowed_tokens_fn=lambda batch, ids: [10 + batch, 20, 30 + len(ids)])
    assert torch.equal(ours, theirs)


def test_stop_strings_reach_the_tokenizer() -> None:
    """transformers drops `tokenizer` on the way to a custom_generate callable; dyndepth hands it over."""
    tokenizer = characters()
    free, _ = both()
    stop = tokenizer.decode(free[0, INPUTS["input_ids"].shape[1] + 3 : INPUTS["input_ids"].shape[1] + 5])
    criteria = t.StoppingCriteriaList([t.StopStringCriteria(tokenizer, [stop])])
    expected = MODEL.generate(**INPUTS, max_new_tokens=10, do_sample=False, stopping_criteria=criteria)
    ours = MODEL.generate(
        **INPUTS,
        max_new_tokens=10,
        do_sample=False,
        custom_generate=dyndepth.generate,
        stop_strings=[stop],
        tokenizer=tokenizer,
    )
    assert torch.equal(ours, expected)
    assert int((ours[0] == 0).sum()) > 0, "the first sequence must have stopped for this to test anything"


def test_streamer_receives_every_token() -> None:
    """transformers drops `streamer` on the way to a custom_generate callable; dyndepth hands it over."""

    class Collect(t.generation.BaseStreamer):
        def __init__(self) -> None:
            self.parts: list[torch.Tensor] = []
            self.ended = 0

        def put(self, value: torch.Tensor) -> None:
            self.parts.append(value)

        def end(self) -> None:
            self.ended += 1

    theirs, ours = Collect(), Collect()
    MODEL.generate(**INPUTS, max_new_tokens=6, do_sample=False, streamer=theirs)
    MODEL.generate(**INPUTS, max_new_tokens=6, do_sample=False, streamer=ours, custom_generate=dyndepth.generate)
    assert [part.tolist() for part in ours.parts] == [part.tolist() for part in theirs.parts]
    assert ours.ended == 1


def test_iterator_streamer_ends() -> None:
    streamer = t.TextIteratorStreamer(characters(), timeout=20)
    one = {name: value[:1] for name, value in INPUTS.items()}
    worker = threading.Thread(
        target=MODEL.generate, kwargs={**one, "streamer": streamer, "max_new_tokens": 5, "custom_generate": dyndepth.generate}
    )
    worker.start()
    text = "".join(streamer)
    worker.join(timeout=20)
    assert len(text) >= 5


def test_sampling_with_a_generator() -> None:
    def run(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return MODEL.generate(
            **INPUTS, max_new_tokens=8, do_sample=True, custom_generate=dyndepth.generate, generator=generator
        )

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_input_embeddings() -> None:
    embeds = MODEL.get_input_embeddings()(INPUTS["input_ids"])
    options = {"attention_mask": INPUTS["attention_mask"], "max_new_tokens": 7, "do_sample": False}
    theirs = MODEL.generate(inputs_embeds=embeds, **options)
    assert torch.equal(MODEL.generate(inputs_embeds=embeds, custom_generate=dyndepth.generate, **options), theirs)


@pytest.mark.parametrize("batch", [1, 2])
def test_single_token_prompts(batch: int) -> None:
    ids = torch.full((batch, 1), 5)
    theirs = MODEL.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(MODEL.generate(ids, max_new_tokens=5, do_sample=False, custom_generate=dyndepth.generate), theirs)


def test_masked_tokens_inside_a_prompt() -> None:
    """A hole in the mask is a token that was never there."""
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    whole = MODEL.generate(ids[:, [0, 1, 3, 4]], max_new_tokens=5, do_sample=False, custom_generate=dyndepth.generate)
    holed = MODEL.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, custom_generate=dyndepth.generate)
    assert torch.equal(holed[:, 5:], whole[:, 4:])


def test_dynamic_output_fields() -> None:
    exits = tiny_exits.mixed(MODEL)
    out = MODEL.generate(
        **INPUTS,
        custom_generate=dyndepth.generate,
        exits=exits,
        max_new_tokens=9,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert out.exit_layers.shape == out.layers_run.shape == out.bands_taken.shape == (6, 9)
    assert out.kv == "predict"
    reached = out.exit_layers >= 0
    for row, step in reached.nonzero().tolist():
        taken = [band for number, band in enumerate(exits) if int(out.bands_taken[row, step]) >> number & 1]
        assert int(out.layers_run[row, step]) == 6 - sum(band.resume - band.leave for band in taken)
        good = [band.leave for band in taken if band.resume == 6]
        assert int(out.exit_layers[row, step]) == (good[0] if good else 6)
    assert len(out.work.layers) == 6
    assert out.prompt_work.fraction == 1.0


@pytest.mark.parametrize("kv", ["predict", "propagate"])
def test_everyone_leaves_at_once_and_nobody_leaves(kv: str) -> None:
    for threshold, fraction in ((-1.0, 0.5), (2.0, 1.0)):
        exits = tiny_exits.exits_of(MODEL, tiny_exits.band(MODEL, 3, 6, threshold=threshold))
        out = MODEL.generate(
            **INPUTS, custom_generate=dyndepth.generate, exits=exits, kv=kv, max_new_tokens=5, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert out.work.fraction == fraction


def test_band_then_exit_in_one_pass() -> None:
    """A row may skip one band, resume, and leave for good above it."""
    exits = tiny_exits.exits_of(
        MODEL, tiny_exits.band(MODEL, 1, 3, threshold=-1.0), tiny_exits.band(MODEL, 3, 6, threshold=-1.0)
    )
    out = MODEL.generate(
        **INPUTS,
        custom_generate=dyndepth.generate,
        exits=exits,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert out.work.layers == [out.work.rows, 0, 0, 0, 0, 0]
    assert set(out.bands_taken.flatten().tolist()) == {3}


# -- bad input: a clear exception, and a model that still works ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_beams": 3}, ArgumentError, r"beam search is not supported \(num_beams must be 1, got 3\)"),
        ({"prompt": "half"}, ArgumentError, "prompt must be one of full, dynamic, got 'half'"),
        (
            {"output_hidden_states": True, "return_dict_in_generate": True},
            ArgumentError,
            "output_hidden_states is not supported",
        ),
        ({"kv": "clone"}, ExitsError, "kv must be one of predict, propagate, copy, recompute, release, none, got 'clone'"),
        ({"pages": 2, "page_size": 8}, PagesFullError, r"sequence \d wants \d more pages"),
        ({"penalty_alpha": 0.6, "top_k": 4}, ArgumentError, "penalty_alpha is another way of decoding"),
        ({"dola_layers": "low"}, ArgumentError, "dola_layers is another way of decoding"),
        ({"assistant_model": MODEL}, ArgumentError, "assistant_model is not supported"),
        ({"page_size": 0}, ArgumentError, "page_size must be at least 1"),
        ({"prefill_chunk": 0}, ArgumentError, "chunk must be at least 1"),
        ({"depth": 3}, ExitsError, r"depth must name an exit point \[\] or the top \(6\), got 3"),
        ({"depth": [6, 6]}, ArgumentError, r"depth must have one entry per sequence \(6\), got 2"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MODEL.generate(**INPUTS, custom_generate=dyndepth.generate, max_new_tokens=4, **options)
    ours, theirs = both(max_new_tokens=3)
    assert torch.equal(ours, theirs)


def test_right_padding_is_refused() -> None:
    mask = INPUTS["attention_mask"].flip(1)
    with pytest.raises(ArgumentError, match=r"attention_mask must be 1 in the last column \(pad on the left\)"):
        MODEL.generate(INPUTS["input_ids"], attention_mask=mask, custom_generate=dyndepth.generate, max_new_tokens=2)


def test_foreign_cache_is_refused() -> None:
    cache = MODEL(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    with pytest.raises(ArgumentError, match="past_key_values with content is not supported"):
        MODEL.generate(torch.tensor([[3, 4, 5, 6]]), past_key_values=cache, custom_generate=dyndepth.generate, max_new_tokens=2)


def test_called_directly_it_says_how() -> None:
    with pytest.raises(TypeError, match=r"model\.generate\(\.\.\., custom_generate=dyndepth\.generate"):
        dyndepth.generate(MODEL, INPUTS["input_ids"])


def test_policy_none_needs_bands_that_leave_no_hole() -> None:
    exits = tiny_exits.exits_of(MODEL, tiny_exits.band(MODEL, 3, 6))
    with pytest.raises(ExitsError, match=r"kv='none' leaves holes .* criterion router of band \[3, 6\)"):
        MODEL.generate(**INPUTS, custom_generate=dyndepth.generate, exits=exits, kv="none", max_new_tokens=2)


def test_policy_predict_needs_maps() -> None:
    exits = tiny_exits.exits_of(MODEL, Band(3, 6, FixedDepth()))
    with pytest.raises(ExitsError, match=r"band \[3, 6\) has no K,V maps for kv='predict'"):
        MODEL.generate(**INPUTS, custom_generate=dyndepth.generate, exits=exits, kv="predict", depth=3, max_new_tokens=2)
