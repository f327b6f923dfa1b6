"""Every way of generating, under eviction, against a stock model that is told what each head may still see."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from learnevict import EvictingCache, attach, methods
from learnevict.errors import CacheError, LearnevictWarning, PaddingReadWarning, UsageError
from learnevict.infer.chat import Chat
from learnevict.infer.generate import generate, read_chat
from learnevict.signals import NEVER
from learnevict.testbed import build_tokenizer
from tests import brute_force as brute
from tests.closeness import close
from tests.laws import zoo
from tests.laws.cases import Case
from tests.laws.naive import forgetting, masked_logits, masking
from tests.laws.policies import hashed
from tests.laws.run import Reader, Script, batch, occupied, pieces, read

CLOSE = 1e-4
PROMPT, NEW = 30, 16
PADS = (0, 4, 11)
pytestmark = pytest.mark.filterwarnings("ignore::learnevict.errors.StockLayersWarning")


def prompt(model: Any, seed: int = 3, length: int = PROMPT) -> dict[str, Tensor]:
    ids, mask = batch(zoo.tokens(model, len(PADS), length, seed), PADS)
    return {"input_ids": ids, "attention_mask": mask}


def answer(model: Any, inputs: dict[str, Tensor], cache: Any = None, **how: Any) -> Any:
    """generate() with logits, of exactly NEW tokens unless told otherwise."""
    how = (
        {"max_new_tokens": NEW, "do_sample": False}
        | ({} if "generation_config" in how else {"eos_token_id": None})
        | how
    )
    how |= {} if cache is None else {"past_key_values": cache}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **how)


def longer(mask: Tensor, length: int) -> Tensor:
    """The mask of a prompt and its answer."""
    return torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)


def agree_with_judge(model: Any, inputs: dict[str, Tensor], out: Any, cache: EvictingCache, returned: int = 1) -> None:
    """The logits of every generated token are those of one stock pass that obeys the recorded trace."""
    read_ids = out.sequences[:, :-1]
    mask = longer(inputs["attention_mask"].repeat_interleave(returned, 0), read_ids.shape[1])
    trace = cache.trace()
    assert trace.evictions > 0
    assert bool((trace.expiry[trace.expiry != NEVER] > inputs["input_ids"].shape[1]).any()), (
        "nothing went while decoding"
    )
    expected = masked_logits(model, read_ids, mask, trace.expiry)[:, -len(out.logits) :]
    close(torch.stack(out.logits, 1), expected, CLOSE)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "temperature": 0.7, "top_k": 0},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
        {"prefill_chunk_size": 8},
    ],
    ids=["greedy", "sampling", "returning two", "chunked"],
)
def test_generate(how, ragged):
    model = zoo.build("llama")
    inputs = prompt(model)
    torch.manual_seed(0)
    with attach(model, hashed(ragged=ragged), record=True) as cache:
        out = answer(model, inputs, cache, **how)
    agree_with_judge(model, inputs, out, cache, how.get("num_return_sequences", 1))


@pytest.mark.parametrize("method", ["h2o", "snapkv", "adakv", "tova"])
@pytest.mark.parametrize("chunk", [1, 5, 29, 64])
def test_chunks_change_nothing(method, chunk):
    """29 leaves a last chunk of one token; with chunks of 1 some rows begin later than others."""
    model = zoo.build("qwen3")
    inputs = prompt(model)
    policy = methods.load(method).policy(16, slack=4, sinks=2, recent=3)
    found = []
    for size in (None, chunk):
        with attach(model, policy, record=True) as cache:
            out = answer(model, inputs, cache, prefill_chunk_size=size)
        found.append((out.sequences, cache.trace().expiry, torch.stack(out.logits, 1)))
    (sequences, expiry, logits), (other_sequences, other_expiry, other_logits) = found
    assert torch.equal(sequences, other_sequences)
    assert torch.equal(expiry, other_expiry)
    close(logits, other_logits, CLOSE)


@pytest.mark.parametrize("ragged", [False, True])
def test_prompt_protection_with_chunks(ragged):
    """With prompt_length it does not matter how the prompt is cut."""
    model = zoo.build("llama")
    inputs = prompt(model)
    lengths = [PROMPT - pad for pad in PADS]
    found = []
    for chunk in (None, 1, 29):
        policy = hashed(12, ragged=ragged, protect=True)
        with attach(model, policy, record=True, prompt_length=lengths) as cache:
            out = answer(model, inputs, cache, prefill_chunk_size=chunk)
        expiry = cache.trace().expiry
        assert bool((expiry[..., :PROMPT] == NEVER).all())
        assert bool((expiry[..., PROMPT:] != NEVER).any())
        found.append((out.sequences, expiry))
    for sequences, expiry in found[1:]:
        assert torch.equal(sequences, found[0][0])
        assert torch.equal(expiry, found[0][1])


def beams(model: Any, inputs: dict[str, Tensor], cache: Any = None, **how: Any) -> tuple[Tensor, Tensor]:
    out = answer(model, inputs, cache, num_beams=3, num_return_sequences=2, output_scores=True, **how)
    return out.sequences, out.sequences_scores


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_beams_with_room_for_all(name):
    model = zoo.build(name)
    inputs = prompt(model)
    expected = beams(model, inputs)
    with attach(model, hashed(200)) as cache:
        found = beams(model, inputs, cache)
    assert torch.equal(found[0], expected[0])
    close(found[1], expected[1], CLOSE)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("slack", [4, 0])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_beams_under_eviction(name, slack, ragged):
    """What goes depends on positions alone, so a stock beam search without cache can be told beforehand."""
    model = zoo.build(name)
    inputs = {"input_ids": zoo.tokens(model, 2, PROMPT, 5)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    policy = hashed(20, slack=slack, ragged=ragged)
    ids = zoo.tokens(model, 1, PROMPT + NEW, 9)
    told = forgetting(read(model, policy, ids, torch.ones_like(ids)).trace.expiry)
    with masking(model, told):
        expected = beams(model, inputs, use_cache=False)
    with attach(model, policy) as cache:
        found = beams(model, inputs, cache)
    assert torch.equal(found[0], expected[0])
    close(found[1], expected[1], CLOSE)
    assert cache.positions(cache.evicting[0]).shape[0] == 6


def test_beams_record_no_trace():
    model = zoo.build("llama")
    with attach(model, hashed(), record=True) as cache, pytest.raises(CacheError, match="record=False"):
        beams(model, prompt(model), cache)


def selected(rows: list[int], ids: Tensor, mask: Tensor, fresh: int, model: Any) -> tuple[Tensor, Tensor]:
    """Rows of a text, each with a continuation of its own."""
    new = zoo.tokens(model, len(rows), fresh, fresh)
    return torch.cat([ids[rows], new], 1), longer(mask[rows], ids.shape[1] + fresh)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("h2o", "gemma2"),
        ("snapkv", "gpt_oss"),
        ("adakv", "gemma3"),
        ("rkv", "qwen3"),
        ("tova", "qwen2"),
        ("expected_attention", "llama"),
        ("foresightkv", "phi3"),
        ("lexical", "mistral"),
        ("clausal", "llama"),
    ],
)
def test_notes_and_queries_go_with_their_row(method, name):
    """Rows are selected, repeated and reordered between events, while decoding, some before their first eviction; each
    goes on as its text does alone."""
    case = Case(method, name)
    model, (ids, mask) = case.model, case.text()
    policy, ids, mask = case.policy(ids, mask), ids[:, :25], mask[:, :25]
    with attach(model, policy) as cache:
        Reader(model, cache, ids, mask, pieces(22, 25)).finish()
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        ids, mask = selected([2, 2, 0, 0], ids, mask, 6, model)
        Reader(model, cache, ids, mask, [1] * 6).finish()
        rows = [3, 0, 0, 1]
        cache.reorder_cache(torch.tensor(rows))
        ids, mask = selected(rows, ids, mask, 12, model)
        found = Reader(model, cache, ids, mask, [1] * 12).finish()
    for row in range(4):
        own = mask[row].bool()
        text = ids[row : row + 1, own]
        alone = read(model, policy, text, torch.ones_like(text), pieces(text.shape[1] - 12, text.shape[1]))
        assert bool((alone.trace.expiry > text.shape[1] - 12).logical_and(alone.trace.expiry != NEVER).any())
        close(found.logits[row], alone.logits[0, -12:], 1e-5)
        for index in cache.evicting:
            held = cache.positions(index)[row : row + 1]
            held = torch.where(held < 0, held, held - int((~own).sum()))
            assert occupied(held) == occupied(alone.cache.positions(index))


@dataclass
class Told:
    """One row of a conversation under hashed(12), by a dumb model: when each token of two layers of two heads goes."""

    ragged: bool
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    ends: Tensor = field(default_factory=lambda: torch.zeros(2, 2, 0, dtype=torch.int32))
    seen: int = 0
    live: int = 0
    block: int = 0

    @property
    def first(self) -> int:
        return self.mask.index(1)

    @property
    def real(self) -> list[int]:
        return [column for column, real in enumerate(self.mask) if real]

    def held(self, layer: int, head: int) -> list[int]:
        """Columns read and not gone."""
        ends = self.ends[layer, head].tolist()
        return [column for column, end in enumerate(ends) if self.mask[column] and end == NEVER]

    def pad(self, size: int) -> None:
        self.ids += [0] * size
        self.mask += [0] * size
        self.ends = torch.nn.functional.pad(self.ends, (0, size), value=NEVER)

    def read(self, token: int) -> None:
        """One more token, and every 4 tokens an event that leaves 12 a head."""
        self.pad(1)
        self.ids[-1] = token
        self.mask[-1] = 1
        self.seen, self.live = self.seen + 1, self.live + 1
        if self.seen % 4:
            return
        if self.live > 12:
            for layer in range(2):
                self.evict(layer, len(self.ids))
            self.live = 12
        self.block = len(self.ids)

    def evict(self, layer: int, end: int) -> None:
        """2 sinks, 3 recent tokens and the block stay, and what Random ranks highest."""
        held, place = [self.held(layer, head) for head in range(2)], {j: rank for rank, j in enumerate(self.real)}
        safe = [{j for j in one if place[j] < 2 or j >= min(self.block, self.real[-3])} for one in held]
        counts = [12, 12]
        if self.ragged:
            free = 24 - len(safe[0]) - len(safe[1])
            more = min(free * 2 // 3, len(held[0]) - len(safe[0]))
            counts = [len(safe[0]) + more, len(safe[1]) + free - more]
        for head, columns in enumerate(held):
            times = [[], []]
            times[head] = [place[j] for j in columns]
            scores = brute.hashed(0)(SimpleNamespace(layer=layer, held=times), head)
            scores = {self.real[rank]: x for rank, x in scores.items()}
            for j in brute.ranked(columns, safe[head], scores)[counts[head] :]:
                self.ends[layer, head, j] = end

    def hide(self, size: int) -> None:
        """The last tokens were padding after all."""
        for column in range(len(self.ids) - size, len(self.ids)):
            self.ends[:, :, column].clamp_(max=len(self.ids))
            self.seen, self.live = self.seen - self.mask[column], self.live - self.mask[column]
            self.mask[column] = 0
        self.block = self.real[self.seen // 4 * 4] if self.seen % 4 else self.real[-1] + 1


class Conversations(RuleBasedStateMachine):
    """Turns, steps, selected, repeated and reordered rows and resets in any order, through one cache."""

    @initialize(ragged=st.booleans())
    def start(self, ragged):
        self.model, self.random = zoo.build("llama"), torch.Generator().manual_seed(0)
        self.attachment = attach(self.model, hashed(12, ragged=ragged))
        self.ragged, self.cache, self.rows = ragged, self.attachment.cache, []

    def teardown(self):
        if hasattr(self, "attachment"):
            self.cache.used = True  # a conversation may be over before it began
            self.attachment.detach()

    def tokens(self, size: int) -> Tensor:
        return torch.randint(3, zoo.VOCABULARY, (len(self.rows), size), generator=self.random)

    def go_on(self, pieces: list[int], pads: list[int]) -> None:
        """Reads fresh tokens piece by piece, the first pads[b] columns of row b being padding."""
        size = sum(pieces)
        for row, pad, tokens in zip(self.rows, pads, self.tokens(size).tolist(), strict=True):
            row.pad(pad)
            for token in tokens[pad:]:
                row.read(token)
        ids, mask = (torch.tensor([getattr(row, name) for row in self.rows]) for name in ("ids", "mask"))
        found = Reader(self.model, self.cache, ids, mask, pieces).finish().logits
        told = torch.stack([row.ends for row in self.rows], 1)
        expected = masked_logits(self.model, ids, mask, told)[:, -size:]
        close(found, expected, CLOSE, mask[:, -size:])

    @precondition(lambda self: not self.rows)
    @rule(pads=st.lists(st.integers(0, 8), min_size=1, max_size=3), size=st.integers(9, 20))
    def begin(self, pads, size):
        self.rows = [Told(self.ragged) for _ in pads]
        self.go_on([size], pads)

    @precondition(lambda self: self.rows)
    @rule(size=st.integers(2, 12), hidden=st.integers(0, 3))
    def turn(self, size, hidden):
        """The first row may have ended early in the turn before."""
        self.rows[0].hide(min(hidden, len(self.rows[0].ids) - self.rows[0].first - 1))
        self.go_on([size], [0] * len(self.rows))

    @precondition(lambda self: self.rows)
    @rule(size=st.integers(1, 9))
    def steps(self, size):
        self.go_on([1] * size, [0] * len(self.rows))

    @precondition(lambda self: self.rows)
    @rule(picks=st.lists(st.integers(0, 8), min_size=1, max_size=4), beams=st.booleans())
    def select(self, picks, beams):
        rows = [pick % len(self.rows) for pick in picks]
        (self.cache.reorder_cache if beams else self.cache.batch_select_indices)(torch.tensor(rows))
        self.rows = [deepcopy(self.rows[row]) for row in rows]

    @precondition(lambda self: 0 < len(self.rows) < 3)
    @rule()
    def repeat(self):
        self.cache.batch_repeat_interleave(2)
        self.rows = [deepcopy(row) for row in self.rows for _ in range(2)]

    @precondition(lambda self: self.rows)
    @rule()
    def reset(self):
        self.cache.reset()
        self.rows = []

    @invariant()
    def the_same_tokens_are_held(self):
        for layer in range(2) if self.rows else ():
            found = occupied(self.cache.positions(layer))
            assert found == [[row.held(layer, head) for head in range(2)] for row in self.rows]


TestConversations = pytest.mark.filterwarnings("ignore::learnevict.errors.PaddingReadWarning")(Conversations.TestCase)
TestConversations.settings = settings(max_examples=15, stateful_step_count=12)


class Collector(BaseStreamer):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.told.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streaming(capsys):
    model = zoo.build("llama")
    inputs = {name: part[:1] for name, part in prompt(model).items()}
    streamer, text = Collector(), TextStreamer(build_tokenizer(), skip_prompt=True)
    with attach(model, hashed()) as cache:
        out = answer(model, inputs, cache, streamer=streamer)
        cache.reset()
        answer(model, inputs, cache, streamer=text)
    new = out.sequences[0, PROMPT:].tolist()
    assert streamer.told[1:] == [[token] for token in new]
    assert streamer.ended
    assert capsys.readouterr().out.split() == build_tokenizer().decode(new).split()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_later_turns_evict_too(name, ragged):
    """Three turns through one cache; every turn's answer is that of one stock pass over the whole conversation."""
    model = zoo.build(name)
    inputs, turns = prompt(model), 3
    with attach(model, hashed(18, ragged=ragged), record=True) as cache:
        for turn in range(turns):
            out = answer(model, inputs, cache)
            agree_with_judge(model, inputs, out, cache)
            ends = cache.trace().expiry
            begin = inputs["input_ids"].shape[1] - (PROMPT if turn else 0)
            assert bool(((ends >= begin) & (ends != NEVER)).any())
            user = zoo.tokens(model, len(PADS), 11, 20 + turn)
            ids = torch.cat([out.sequences, user], 1)
            inputs = {"input_ids": ids, "attention_mask": longer(inputs["attention_mask"], ids.shape[1])}
    for index in cache.evicting:
        assert int((cache.positions(index) >= 0).sum((1, 2)).max()) <= 2 * (18 + 4)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_tokens_masked_between_turns_are_gone(name, ragged):
    """What was read as text, and the next turn's mask calls padding, is taken back; the user hears that it had a price."""
    model = zoo.build(name)
    inputs = prompt(model)
    with attach(model, hashed(18, ragged=ragged), record=True) as cache:
        first = answer(model, inputs, cache)
        ids = torch.cat([first.sequences, zoo.tokens(model, len(PADS), 7, 21)], 1)
        mask = longer(inputs["attention_mask"], ids.shape[1])
        mask[1, PROMPT + 5 : PROMPT + NEW] = 0
        with pytest.warns(PaddingReadWarning, match="10 tokens"):
            second = answer(model, {"input_ids": ids, "attention_mask": mask}, cache)
    read_ids = second.sequences[:, :-1]
    expected = masked_logits(model, read_ids, longer(mask, read_ids.shape[1]), cache.trace().expiry)[:, -NEW:]
    close(torch.stack(second.logits, 1), expected, CLOSE)
    now = cache.trace().expiry
    assert bool((now[cache.evicting, 1, :, PROMPT + 5 : PROMPT + NEW - 1] <= PROMPT + NEW - 1).all())


def converse(
    model: Any, policy: Any, prompts: list[list[int]], answers: list[list[int]], more: list[list[int]], ends: dict
) -> tuple[list[Tensor], list[list[list[list[list[int]]]]]]:
    """Two turns through generate(): logits of the second, row by row; tokens held after each turn, in each row's own time."""
    ids = mask = torch.zeros(len(prompts), 0, dtype=torch.long)
    held, logits = [], ()
    with attach(model, policy) as cache:
        for texts, told in ((prompts, answers), (more, more)):
            width = max(map(len, texts))
            rows = torch.tensor([[0] * (width - len(text)) + text for text in texts])
            ids, mask = torch.cat([ids, rows], 1), torch.cat([mask, (rows > 0).long()], 1)
            how = {"max_new_tokens": max(map(len, told)), "logits_processor": [Script(told)]} | ends
            out = answer(model, {"input_ids": ids, "attention_mask": mask}, cache, **how)
            ids, logits = out.sequences, out.logits
            size = torch.tensor([[len(row)] for row in told])
            mask = torch.cat([mask, (torch.arange(ids.shape[1] - mask.shape[1]) < size).long()], 1)
            place = torch.nn.functional.pad(mask.cumsum(-1) - 1, (0, 1), value=-1)
            layers = [cache.positions(index) for index in cache.evicting]
            held.append(
                [occupied(place.gather(1, one.flatten(1).long() % place.shape[1]).view_as(one)) for one in layers]
            )
    return list(torch.stack(logits, 1)), held


class Stop(StoppingCriteria):
    """Ends rows with a token, without saying which it is; asked once for each new token."""

    def __init__(self, token: int) -> None:
        self.token, self.asked = token, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.asked += 1
        return input_ids[:, -1] == self.token


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, as many as the zoo's models have tokens."""
    marks = [*map(chr, range(33, 127)), "\u0120", "\u010a"][: zoo.VOCABULARY]
    tokenizer = Tokenizer(BPE({mark: index for index, mark in enumerate(marks)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


ENDINGS = ["eos_token_id", "generation_config", "criteria", "string", "its criterion"]


@pytest.mark.parametrize("given", ENDINGS)
@pytest.mark.parametrize("method", ["streaming_llm", "adakv"])
def test_a_row_that_ends_early_goes_on_as_alone(method, given, monkeypatch):
    """Of three rows two end early in the first turn, and write less in the second, each beginning at another column."""
    model, policy = zoo.build("llama"), methods.load(method).policy(18, slack=4, sinks=2, recent=3)
    end = 2 if given in ENDINGS[:2] else 50
    text = zoo.tokens(model, 3, 80, 8)
    text = torch.where(text == end, 51, text).tolist()
    prompts = [row[: 30 - pad] for row, pad in zip(text, PADS, strict=True)]
    answers = [[*row[30 : 30 + size], end] for row, size in zip(text, (25, 4, 9), strict=True)]
    more = [row[60 : 60 + size] for row, size in zip(text, (12, 12, 7), strict=True)]
    tokenizer, ends = letters(), {"eos_token_id": 2}
    if given == "generation_config":  # which leaves to the model's what it does not say
        monkeypatch.setattr(model.generation_config, "eos_token_id", 2)
        ends = {"generation_config": GenerationConfig(output_logits=True)}
    if given == "criteria":
        ends["stopping_criteria"] = [Stop(end)]
    if given == "string":
        ends |= {"stop_strings": [tokenizer.decode([end])], "tokenizer": tokenizer}
    if given == "its criterion":
        ends["stopping_criteria"] = [StopStringCriteria(tokenizer, [tokenizer.decode([end])])]
    logits, held = converse(model, policy, prompts, answers, more, ends)
    for row in range(3):
        own = ([part[row]] for part in (prompts, answers, more))
        alone, kept = converse(model, policy, *own, ends)
        size = len(more[row])
        close(logits[row][:size], alone[0][:size], CLOSE)
        if len(answers[row]) == max(map(len, answers)):  # else its end token has been read in the batch already
            assert [layer[row] for layer in held[0]] == [layer[0] for layer in kept[0]]
        if size == max(map(len, more)):
            assert [layer[row] for layer in held[1]] == [layer[0] for layer in kept[1]]


def test_a_criterion_pads_nobody_where_no_end_token_is_known():
    """generate() then lets a row that ended go on with tokens of its own, and so does a cache that evicts nothing."""
    model, inputs = zoo.build("llama"), prompt(zoo.build("llama"))
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    stock = model.generate(**inputs, **how)
    end = int(stock[0, inputs["input_ids"].shape[1] + 2])
    expected = model.generate(**inputs, **how, stopping_criteria=[Stop(end)])
    with attach(model, methods.load("streaming_llm").policy(400, slack=4)) as cache:
        assert torch.equal(
            model.generate(**inputs, **how, stopping_criteria=[Stop(end)], past_key_values=cache), expected
        )
        assert cache.clock.seen == [expected.shape[1] - 1 - pad for pad in PADS]


def test_only_padding_after_an_end_token_is_no_text():
    """A conversation may be read token by token, end tokens, and pad tokens anywhere else, included."""
    model = zoo.build("llama")
    ids = torch.tensor([[5, 6, 7, 2, 8, 0, 9, 2, 0, 0, 0], [5, 6, 2, 0, 7, 2, 2, 0, 2, 0, 9]])
    seen = []
    with attach(model, hashed(30)) as cache, torch.no_grad():
        for part in ids.split([2, *[1] * 9], 1):
            model(part, past_key_values=cache)
            seen.append(list(cache.clock.seen))
    assert seen == [[2, 2], [3, 3], [4, 3], [5, 4], [6, 5], [7, 6], [8, 6], [8, 7], [8, 7], [8, 8]]


@pytest.mark.parametrize(
    ("eos", "pad", "known"), [(None, 0, [11, 11]), (2, None, [11, 5]), (2, 0, [11, 5]), ([2, 5], None, [11, 5])]
)
def test_what_generate_is_told_of_ends_counts(eos, pad, known):
    """An explicit None is no "not said"; an unset pad token is the first end token, as transformers has it."""
    model, told = zoo.build("llama"), [[9] * 8, [2, 2, 0, 2, 2, 0, 0, 2]]
    ids = zoo.tokens(model, 2, 4)
    with attach(model, hashed(30)) as cache:
        answer(
            model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache, logits_processor=[Script(told)],
            max_new_tokens=8, eos_token_id=eos, pad_token_id=pad,
        )  # fmt: skip
    assert cache.clock.seen == known


def test_criteria_are_asked_once_and_keep_what_they_say():
    model, criterion = zoo.build("llama"), Stop(2)
    with attach(model, hashed(30)) as cache:
        answer(model, prompt(model), cache, stopping_criteria=[criterion], max_new_tokens=5)
        assert criterion.asked == 5
        cache.reset()
        by_length = StoppingCriteriaList([MaxLengthCriteria(PROMPT + 3)])
        assert answer(model, prompt(model), cache, stopping_criteria=by_length).sequences.shape[1] == PROMPT + 3


def test_a_mask_counts_in_turns_of_one_token():
    """Padding among them, and what was read as text before, is hidden as in a stock cache; what is padding stays it."""
    model = zoo.build("llama")
    ids, mask = zoo.tokens(model, 2, 14), torch.ones(2, 14, dtype=torch.int64)
    mask[1, 9:11] = 0
    found, expected = [], []
    with attach(model, hashed(30)) as cache, torch.no_grad():
        for held, logits in ((cache, found), (zoo.stock_cache(model), expected)):
            model(ids[:, :9], past_key_values=held)
            for column in range(9, 14):
                shown = mask[:, : column + 1].clone()
                shown[0, 3] = column < 12
                places = (shown.cumsum(-1) - 1)[:, -1:]
                given = {"attention_mask": shown, "position_ids": places, "past_key_values": held}
                logits.append(model(ids[:, column : column + 1], **given).logits[shown[:, -1] == 1])
        assert cache.clock.seen == [13, 12]
        with pytest.raises(CacheError, match="read padding"):
            model(ids[:, :1], attention_mask=torch.ones(2, 15, dtype=torch.int64), past_key_values=cache)
    close(torch.cat(found), torch.cat(expected), CLOSE)


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_padding_before_a_turn_read_in_chunks(chunk):
    model = zoo.build("llama")
    inputs = prompt(model)
    with attach(model, hashed(200)) as cache:
        out = answer(model, inputs, cache)
        ids = torch.cat([out.sequences, zoo.tokens(model, len(PADS), 7, 21)], 1)
        mask = longer(inputs["attention_mask"], ids.shape[1])
        mask[1, -7:-3] = 0
        given = {"input_ids": ids, "attention_mask": mask}
        found = answer(model, given, cache, prefill_chunk_size=chunk)
    close(torch.stack(found.logits, 1), torch.stack(answer(model, given).logits, 1), CLOSE)


def test_a_turn_without_mask_is_refused_where_padding_was_read():
    """A stock cache would take the padding for text."""
    model, inputs = zoo.build("llama"), prompt(zoo.build("llama"))
    with attach(model, hashed()) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        with pytest.raises(CacheError, match=r"read padding.*attention_mask"):
            model(inputs["input_ids"], past_key_values=cache)


def test_a_prompt_of_one_token_and_embeddings():
    model = zoo.build("llama")
    ids = zoo.tokens(model, 2, 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with attach(model, hashed(), record=True) as cache:
        out = answer(model, inputs, cache, max_new_tokens=32)
    agree_with_judge(model, inputs, out, cache)
    inputs = prompt(model)
    with attach(model, hashed(), record=True) as cache:
        out = answer(model, inputs, cache)
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    with attach(model, hashed(), record=True) as other:
        again = answer(model, embedded | {"attention_mask": inputs["attention_mask"]}, other)
    assert torch.equal(again.sequences, out.sequences[:, PROMPT:])
    assert torch.equal(other.trace().expiry, cache.trace().expiry)


@pytest.mark.parametrize("length", [PROMPT - 14, PROMPT + NEW - 1, PROMPT + 40], ids=["shorter", "as long", "longer"])
@pytest.mark.parametrize("given", ["tokens and mask", "tokens", "embeddings"])
@pytest.mark.parametrize("padded", [False, True])
def test_another_prompt_on_a_used_cache_is_refused(length, given, padded):
    """It would be answered from what was read before; the cache goes on with its own conversation, or after a reset."""
    model = zoo.build("llama")
    inputs, ids = prompt(model), zoo.tokens(model, len(PADS), length, 8)
    inputs["attention_mask"] = inputs["attention_mask"] if padded else torch.ones_like(inputs["attention_mask"])
    other = {"input_ids": ids} if given != "embeddings" else {"inputs_embeds": model.get_input_embeddings()(ids)}
    if given != "tokens":
        other["attention_mask"] = torch.ones_like(ids)
    with attach(model, hashed()) as cache:
        out = answer(model, inputs, cache)
        with pytest.raises(CacheError, match=r"cache\.reset\(\)"):
            answer(model, other, cache, max_new_tokens=1)
        more = torch.cat([out.sequences, zoo.tokens(model, len(PADS), 5, 9)], 1)
        answer(model, {"input_ids": more, "attention_mask": longer(inputs["attention_mask"], more.shape[1])}, cache)
        cache.reset()
        found = answer(model, other, cache)
    with attach(model, hashed()) as cache:
        assert torch.equal(found.sequences, answer(model, other, cache).sequences)


@pytest.mark.parametrize("copies", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_another_prompt_for_beams_is_refused(copies):
    model = zoo.build("llama")
    ids = zoo.tokens(model, 1, PROMPT)
    with attach(model, hashed()) as cache:
        answer(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache, **copies)
        other = zoo.tokens(model, 1, PROMPT + 60, 8)
        for given in ({"input_ids": other}, {"inputs": None, "input_ids": other}):
            with pytest.raises(CacheError, match=r"cache\.reset\(\)"):
                answer(model, {**given, "attention_mask": torch.ones_like(other)}, cache, **copies)


@pytest.mark.parametrize("given", ["all", "all, without mask", "what is new", "by hand"])
def test_a_next_turn_in_every_form(given):
    model = zoo.build("llama")
    ids = zoo.tokens(model, 2, PROMPT)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with attach(model, hashed(200)) as cache:
        first = answer(model, inputs, cache).sequences
        new = zoo.tokens(model, 2, 7, 21)
        ids = torch.cat([first, new], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert cache.starts_with(ids)
        assert cache.starts_with(ids.tolist(), inputs["attention_mask"])
        expected = answer(model, inputs).sequences
        if given == "by hand":
            with torch.no_grad():
                found = model(ids[:, cache.get_seq_length() :], past_key_values=cache).logits[:, -1].argmax(-1)
            assert torch.equal(found, expected[:, ids.shape[1]])
            return
        if given == "all, without mask":
            del inputs["attention_mask"]
        if given == "what is new":
            inputs["input_ids"] = ids[:, cache.get_seq_length() :]
        found = answer(model, inputs, cache).sequences
    assert torch.equal(found[:, -NEW:], expected[:, -NEW:])


def test_what_a_cache_has_read():
    model = zoo.build("llama")
    inputs = prompt(model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    more, seen = torch.cat([ids, ids], 1), longer(mask, 2 * PROMPT)
    cache = EvictingCache(model.config, hashed())
    assert cache.starts_with([[1, 2]])
    with attach(model), torch.no_grad():
        Reader(model, cache, ids, mask, [PROMPT]).finish()
    assert cache.starts_with(more, seen)
    assert cache.starts_with(more)
    assert not cache.starts_with(ids, mask), "there is nothing to go on with"
    assert not cache.starts_with(more[:2])
    assert not cache.starts_with(more, torch.ones_like(more)), "padding is no token"
    for row in range(len(PADS)):
        changed = more.clone()
        changed[row, PADS[row]] += 1
        assert not cache.starts_with(changed, seen)
        changed[row, PADS[row]] -= 1
        changed[row, : PADS[row]] += 1
        assert cache.starts_with(changed, seen)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.starts_with(more[[2, 0, 0]], seen[[2, 0, 0]])
    assert not cache.starts_with(more, seen)
    cache.reset()
    assert cache.starts_with(ids)
    for wrong in ([[1], [1, 2]], [[[1]]], "text"):
        with pytest.raises(UsageError, match="token ids must be"):
            cache.starts_with(wrong)


def test_a_chat_goes_on_through_one_cache():
    """Every answer is that of the whole conversation; what was read is not read again."""
    model, tokenizer = zoo.fresh("llama", vocab_size=len(build_tokenizer())), build_tokenizer()
    read_columns: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: read_columns.append(args[0].shape[1]))
    asked = ["ann has 3", "bob has 4", "ann has"]
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": list(range(9))}
    with Chat(model, tokenizer, hashed(200), eos_token_id=None, **how) as chat:
        answers = [chat.ask(text) for text in asked]
        assert chat.cache.get_seq_length() >= sum(read_columns)
    texts = [part for pair in zip(asked, answers, strict=True) for part in pair]
    assert [message["content"] for message in chat.messages] == texts
    ids = torch.tensor([read_chat(tokenizer, chat.messages[:-1])])
    alone = answer(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **how).sequences
    assert tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True) == answers[-1]
    with Chat(model, tokenizer, hashed(200), eos_token_id=None, **how) as other:
        other.ask(asked[0])
        other.messages[-1]["content"] = "bob"  # not what was read
        assert other.ask(asked[1])
        assert other.cache.starts_with(read_chat(tokenizer, other.messages))
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["h2o", "snapkv", "adakv", "rkv", "kvpop", "foresightkv", "wg_kv", "dms", "judge_q"])
def test_a_prompt_read_in_inference_mode(name):
    """And the rest outside of it, or the other way about."""
    case = Case(name, "llama")
    ids, mask = case.text()
    found = []
    for modes in ((True, False), (False, True), (False, False)):
        policy = case.policy(ids, mask)
        with attach(case.model, policy, record=True) as cache:
            for mode, sizes in zip(modes, ([37], [1] * 12), strict=True):
                with torch.inference_mode(mode):
                    run = Reader(case.model, cache, ids, mask, sizes).finish()
        found.append((run.logits, cache.trace().expiry))
    assert int((found[0][1] != NEVER).sum()) > 0
    for logits, expiry in found[:2]:
        assert torch.equal(logits, found[2][0])
        assert torch.equal(expiry, found[2][1])


def test_beams_go_on_after_inference_mode():
    model = zoo.build("llama")
    with attach(model, hashed()) as cache:
        with torch.inference_mode():
            out = answer(model, prompt(model), cache, num_beams=3, num_return_sequences=3)
        with torch.no_grad():
            model(out.sequences[:, -1:], past_key_values=cache)


def test_assisted_decoding_is_refused():
    model, helper = zoo.build("llama"), zoo.fresh("llama")
    inputs = {name: part[:1] for name, part in prompt(model).items()}
    for how in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": helper}):
        with attach(model, hashed()) as cache, pytest.raises(CacheError, match="assisted and prompt-lookup"):
            answer(model, inputs, cache, **how)


@pytest.mark.parametrize("by", ["argument", "config", "model"])
@pytest.mark.parametrize("kind", ["static", "dynamic", "quantized", "paged"])
def test_settings_for_a_cache_of_transformers_are_not_used(by, kind):
    model = zoo.fresh("llama")
    inputs = prompt(model)
    with attach(model, hashed()) as cache:
        expected = answer(model, inputs, cache).sequences
    how: dict[str, Any] = {"argument": {"cache_implementation": kind}}.get(by, {})
    if by == "config":
        how = {"generation_config": GenerationConfig(cache_implementation=kind), "eos_token_id": None}
    if by == "model":
        model.generation_config.cache_implementation = kind
    with attach(model, hashed()) as cache, pytest.warns(LearnevictWarning, match=f"'{kind}' is not used"):
        assert torch.equal(answer(model, inputs, cache, **how).sequences, expected)


@pytest.mark.parametrize("evicts", [True, False])
def test_how_a_model_would_decode_changes_nothing_for_our_generate(evicts):
    """With these settings in its generation_config.json, a model was of no use to `infer` and `eval`."""
    model, tokenizer = zoo.fresh("llama", vocab_size=len(build_tokenizer())), build_tokenizer()
    model.generation_config.eos_token_id = None
    policy, text = hashed() if evicts else None, ["ann has 3"]
    expected = generate(model, tokenizer, policy, text, max_new_tokens=9)[0].tokens
    own = {
        "cache_implementation": "static", "prompt_lookup_num_tokens": 3, "assistant_early_exit": 1, "use_mtp": True,
        "penalty_alpha": 0.6, "top_k": 4, "dola_layers": "low", "num_beams": 3, "use_cache": False, "max_length": 3,
    }  # fmt: skip
    for name, value in own.items():
        setattr(model.generation_config, name, value)
        assert generate(model, tokenizer, policy, text, max_new_tokens=9)[0].tokens == expected, name


def test_the_model_and_its_config_come_back_unchanged():
    model = zoo.fresh("gemma2")
    before = model.config.to_dict()
    inputs = prompt(model)
    expected = answer(model, inputs)
    with attach(model, hashed()) as cache:
        answer(model, inputs, cache)
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "eager"
    after = answer(model, inputs)
    assert torch.equal(torch.stack(after.logits), torch.stack(expected.logits))
