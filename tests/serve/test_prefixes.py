"""States kept of prompts: found again, bounded, and without any effect on what is answered."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flame_composer.serve import prefixes
from flame_composer.serve.engine import Failure, PromptScores
from flame_composer.serve.metrics import Metrics
from flame_composer.serve.prefixes import Prefixes, describe, ends_of_pieces, num_bytes
from flame_composer.serve.states import Abilities, probe, read
from tests.conftest import GLA, LLAMA
from tests.serve.test_engine import MAMBA, Bench, tiny

SHORT = {**GLA, "use_short_conv": True, "num_hidden_layers": 2}
END = 0  # the token that ends a turn
MANY = 10**9


def begun(model: Any = None, size: int = MANY, **options: Any) -> Bench:
    bench = Bench(model or tiny(SHORT), prefix_cache_bytes=size, **options)
    bench.engine.start()
    return bench


def answer(bench: Bench, prompt: Any, **options: Any) -> Any:
    """All that is delivered of the answers to one prompt: texts, and scores to the last bit."""
    number = bench.submit(prompt, **{"logprobs": 3, **options})
    found = bench.result(number)
    assert not isinstance(found, Failure), found
    return bench.events[number]


def turn(draw: random.Random, most: int) -> list[int]:
    return [*draw.choices(range(1, 250), k=draw.randint(1, most)), END]


def conversations(seed: int) -> list[list[int]]:
    """Prompts of conversations that begin with one of few system prompts, turns among turns."""
    draw = random.Random(seed)
    systems = [turn(draw, 90) for _ in range(2)]
    going = [list(draw.choice(systems)) for _ in range(4)]
    asked: list[list[int]] = []
    for _ in range(24):
        text = draw.choice(going)
        text += turn(draw, 60)
        asked.append([*text, 7, 8])
        text += [7, 8, *turn(draw, 30)]
        if draw.random() < 0.3:
            asked.append(draw.choice(asked))
        if len(text) > 350:
            going[going.index(text)] = list(draw.choice(systems))
    return asked


def states_of(bench: Bench) -> int:
    """The bytes that the kept states take, by their storages, and their tokens."""
    found, size = {}, 0
    for kept in bench.engine.prefixes.kept.values():
        size += len(kept.beginning)
        for tensor in prefixes._tensors(kept.cache):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return size + sum(found.values())


TOKENS = st.lists(st.sampled_from([0, 0, 1, 2]), max_size=120)


@given(TOKENS, TOKENS, TOKENS, st.integers(1, 50))
def test_what_begins_alike_is_read_in_the_same_pieces(
    same: list[int], one: list[int], other: list[int], longest: int
) -> None:
    cuts = []
    for ids in ([*same, *one, 1], [*same, *other, 1]):
        turns = [place for place, id in enumerate(ids, 1) if id == END]
        ends = ends_of_pieces(len(ids), turns, longest)
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        assert ends[-1] == len(ids)
        assert all(0 < size <= longest for size in sizes)
        short = prefixes.SHORTEST_PIECE
        assert all(size >= min(short, longest) for size in sizes[:-1])
        cuts.append([end for end in ends[:-1] if end <= len(same)])
    assert cuts[0] == cuts[1]


HYBRID = {**GLA, "num_hidden_layers": 2, "attn": {"layers": [1], "num_heads": 2}}


@pytest.mark.parametrize(
    "architecture", [SHORT, GLA, LLAMA, HYBRID], ids=["conv", "gla", "llama", "hybrid"]
)
def test_answers_have_the_same_bits(architecture: dict[str, Any]) -> None:
    """With room for all states, for few, and for none; greedy and drawn, with log probabilities."""
    model = tiny(architecture)
    with torch.inference_mode():
        state = num_bytes(read(model, torch.zeros((1, 90), dtype=torch.long), None)[1])
    prompts = conversations(1)
    found, cached = [], []
    for size in (0, 4 * state, MANY):
        bench = begun(model, size)
        prefix = bench.engine.prefixes
        answers = []
        for number, prompt in enumerate(prompts):
            options = {"temperature": number % 2, "seed": number, "n": 1 + number % 3}
            answers.append(answer(bench, prompt, **options))
            assert states_of(bench) == prefix.num_bytes <= size
        found.append(answers)
        cached.append(bench.engine.metrics.cached_tokens)
        read_and_cached = bench.engine.metrics.prompt_tokens + cached[-1]
        assert read_and_cached == sum(map(len, prompts))
        bench.engine.close("done")
        assert prefix.gauges() == {"prefixes": 0, "prefix_bytes": 0}
    assert found[0] == found[1] == found[2]
    assert 0 == cached[0] < cached[1] < cached[2]
    assert cached[2] > 0.6 * sum(map(len, prompts))


def test_what_others_ask_changes_nothing() -> None:
    """Many at a time, some of which leave while they are read: nothing wrong is left behind."""
    model, prompts, draw = tiny(SHORT), conversations(2), random.Random(0)
    alone = begun(model, 0)
    expected = [alone.result(alone.submit(prompt)) for prompt in prompts]
    alone.engine.close("done")
    bench = begun(model, max_waiting=100)
    for _ in range(2):
        numbers = []
        for prompt in prompts:
            if draw.random() < 0.3:
                jobs = bench.jobs([*prompt, *turn(draw, 99), *prompts[0]][:499])
                bench.engine.submit(jobs)
                time.sleep(draw.choice((0, 0.002, 0.005)))
                bench.engine.cancel(jobs)
            numbers.append(bench.submit(prompt))
        assert [bench.result(number) for number in numbers] == expected
    assert bench.engine.metrics.cached_tokens > sum(map(len, prompts))
    assert states_of(bench) == bench.engine.prefixes.num_bytes
    bench.engine.close("done")


def test_the_pieces_of_a_prompt_are_its_own() -> None:
    """Scores are the same to the last bit, whoever is read beside it."""
    model, prompt = tiny(SHORT), [*range(1, 91)]
    bench = begun(model, 0)
    expected = answer(bench, prompt, max_tokens=1)
    bench.engine.close("done")
    for sizes in ((5,), (20, 70), (31, 33, 1)):
        bench = Bench(model)
        for size in sizes:
            bench.submit([9] * size, max_tokens=1)
        number = bench.submit(prompt, max_tokens=1, logprobs=3)
        bench.engine.start()
        bench.result(number)
        assert bench.events[number] == expected
        bench.engine.close("done")


def test_a_system_prompt_and_an_earlier_turn_are_known() -> None:
    bench = begun()
    draw = random.Random(3)
    system, first, reply, second = ([*draw.choices(range(1, 250), k=40), END] for _ in range(4))

    def cached(prompt: list[int], **options: Any) -> int:
        before = bench.engine.metrics.cached_tokens
        answer(bench, prompt, **options)
        return bench.engine.metrics.cached_tokens - before

    # 32 tokens a piece here, and no turn shorter than that ends one: at 32, 64, 96 and 128
    assert cached([*system, *first, 7]) == 0
    assert cached([*system, *second, 7]) == 32
    assert cached([*system, *first, 7, *reply, *second, 7]) == 64
    assert cached([*system, *first, 7, *reply, *second, 7]) == 160
    # What two prompts have in common in between is kept from the second on
    assert cached([*system, *first, 7, *reply, *first, 7]) == 64
    assert cached([*system, *first, 7, *reply, 9, 9]) == 96
    assert cached([*system, *first, 7], echo=True) == 0, "scores of a prompt are in no state"
    assert cached([*system, *first, 7], prompt_cache_key="another's") == 0
    assert cached([*system, *first, 7], prompt_cache_key="another's") == 64
    # Nothing is left to read of the second but what tells the scores
    assert cached([3] * 64) == 0
    assert cached([3] * 64) == 32
    bench.engine.close("done")


def test_turns_end_pieces() -> None:
    bench = begun(prefill_tokens=300)
    draw = random.Random(3)
    sizes = (40, 35, 3, 50)
    system, first, reply, second = ([*draw.choices(range(1, 250), k=k), END] for k in sizes)
    answer(bench, [*system, *first, 7])
    kept = bench.engine.prefixes.kept.values()
    assert sorted(len(each.beginning) // 4 - 8 for each in kept) == [41, 77]
    number = bench.submit([*system, *first, 7, *reply, *second, 7])
    bench.result(number)
    assert bench.engine.metrics.cached_tokens == 77
    bench.engine.close("done")


def test_scores_of_a_prompt_are_those_without() -> None:
    bench, prompt = begun(), [*range(1, 101)]
    asked = {"echo": True, "max_tokens": 3}
    before = answer(bench, prompt, **asked)
    answer(bench, prompt)
    answer(bench, prompt)
    assert bench.engine.metrics.prefix_hits == 1
    assert answer(bench, prompt, **asked) == before
    scores = next(event for event in before if isinstance(event, PromptScores)).scores
    assert len(scores) == 100
    bench.engine.close("done")


def state(number: float) -> dict[str, torch.Tensor]:
    return {"state": torch.full((10,), float(number))}  # 40 bytes, and 32 for whose it is


def test_the_least_recently_used_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Prefixes(3 * (40 + 32 + 4), Metrics())

    def keep(token: int) -> None:
        _, _, wanted = store.start([token, 1], [1, 2], "")
        for name in wanted.values():
            store.keep(name, [token], "", state(token))

    def known(token: int) -> Any:
        start = store.start([token, 1], [1, 2], "")
        assert start.cache is None or float(start.cache["state"][0]) == token
        return start.cache

    for token in (5, 6, 7):
        keep(token)
    taken = known(5)
    taken["state"].zero_()  # whoever takes a state may write into it
    keep(8)
    assert [known(token) is not None for token in (6, 7, 8, 5)] == [False, True, True, True]
    assert store.gauges() == {"prefixes": 3, "prefix_bytes": 3 * 76}
    keep(9)
    assert known(7) is None
    # What is larger than all may be is not kept, and costs nothing that is
    [name] = store.start([1, 1], [1, 2], "").wanted.values()
    store.keep(name, [1], "", {"state": torch.zeros(1000)})
    assert store.gauges() == {"prefixes": 3, "prefix_bytes": 3 * 76}
    # A part of a large tensor costs its own size
    store.keep(name, [1], "", {"state": torch.zeros(1000)[:10]})
    [found] = prefixes._tensors(store.kept[name].cache)
    assert found.untyped_storage().nbytes() == 40
    assert store.gauges() == {"prefixes": 3, "prefix_bytes": 3 * 76}
    monkeypatch.setattr(prefixes, "MOST_KEPT", 2)
    keep(10)
    assert store.gauges() == {"prefixes": 2, "prefix_bytes": 2 * 76}
    store.clear()
    assert store.gauges() == {"prefixes": 0, "prefix_bytes": 0}


def test_a_beginning_is_known_by_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a digest alone, which here is the same for all."""
    monkeypatch.setattr(prefixes, "_digest", lambda _: bytes(32))
    bench, plain = begun(), begun(size=0)
    for prompt in ([5] * 50, [6] * 50, [5] * 50):
        assert answer(bench, prompt) == answer(plain, prompt)
    bench.engine.close("done")
    plain.engine.close("done")


def test_few_digests_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MOST_SEEN", 10)
    store = Prefixes(100, Metrics())
    for number in range(30):
        store.start([number, 1, 2, 3], [1, 2, 3, 4], "")
    assert len(store._seen) == 10


@pytest.mark.parametrize("at", [1, 3])
def test_without_memory_for_a_state_the_answer_is_the_same(
    at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When a state is kept, and when it is taken."""
    bench, prompt, calls = begun(), [*range(1, 60)], []
    copied = prefixes.copied
    expected = answer(begun(size=0), prompt)

    def fail(cache: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return copied(cache)

    monkeypatch.setattr(prefixes, "copied", fail)
    for _ in range(3):
        assert answer(bench, prompt) == expected
    assert "kept states are dropped: CUDA out of memory" in caplog.text
    assert bench.engine.prefixes.gauges()["prefixes"] == 1
    bench.engine.close("done")


NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allo"),
    RuntimeError("could not create a primitive: not enough memory"),
)


@pytest.mark.parametrize("error", NO_MEMORY, ids=["cuda", "cpu", "onednn"])
def test_a_request_without_memory_frees_what_is_kept(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench, prompt = begun(), [*range(1, 60)]
    before = answer(bench, prompt)
    assert bench.engine.prefixes.gauges()["prefixes"] == 1

    def fail(**_: Any) -> Any:
        raise error

    with monkeypatch.context() as within:
        within.setattr(bench.engine.model, "_supports_logits_to_keep", lambda: True)
        within.setattr(bench.engine.model, "forward", fail)
        assert isinstance(bench.result(bench.submit(prompt)), Failure)
    assert bench.engine.prefixes.gauges() == {"prefixes": 0, "prefix_bytes": 0}
    assert answer(bench, prompt) == before
    bench.engine.close("done")


def test_a_model_that_reads_prompts_whole_keeps_nothing() -> None:
    bench = begun(tiny(MAMBA))
    prompt = [*range(1, 80)]
    assert answer(bench, prompt) == answer(bench, prompt)
    assert bench.engine.metrics.cached_tokens == 0
    assert bench.engine.prefixes.gauges()["prefixes"] == 0
    bench.engine.close("done")


def test_what_is_kept_is_said() -> None:
    model = tiny(GLA)
    abilities = probe(model)
    assert describe(model, abilities, 10_000) == (
        "up to 8 states of prompts are kept, of 1,024 bytes each and 4 for each token before it"
    )
    assert "are too few for one of 1,024" in describe(model, abilities, 1000)
    assert describe(model, abilities, 0) == "no states of prompts are kept (prefix_cache_bytes=0)"
    assert "they grow" in describe(model, Abilities(False, True), 10)
    assert "reads a prompt whole" in describe(model, Abilities(True, False), 10)
