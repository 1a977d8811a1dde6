"""The engine against the learner's program: log-probabilities, greedy tokens, and bits that depend on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from afm_rl.generate import Generator
from afm_rl.generation.options import EngineOptions
from afm_rl.types import GenerationRequest, Group, SamplingOptions
from tests.generation.toy import CONFIG, PAGE, PARAMS, ask, cache_of, learner_logps, make, own_logps, prompt_of

#: Prompts and responses of odd lengths, on page borders and beside them, some of which share a beginning.
LENGTHS = ((1, 70), (7, 33), (8, 41), (9, 8), (16, 90), (17, 1), (40, 25), (63, 50))


def mixed(*, temperature: float = 1.3, responses: int = 2) -> list[GenerationRequest]:
    common = prompt_of(64, seed=99)
    prompts = [common[:p] if i % 2 else prompt_of(p, seed=i) for i, (p, _) in enumerate(LENGTHS)]
    options = {"num_responses": responses, "temperature": temperature}
    return [
        ask(prompt, f"r{i}", max_tokens=t, seed=i, **options)
        for i, (prompt, (_, t)) in enumerate(zip(prompts, LENGTHS, strict=True))
    ]


def same(a: Group, b: Group) -> bool:
    """Whether tokens and log-probabilities are the same bits."""
    pairs = (*zip(a.responses, b.responses, strict=True), *zip(a.logps, b.logps, strict=True))
    return all(x.tobytes() == y.tobytes() for x, y in pairs)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("pages", [21, 400])
def test_log_probabilities_agree_with_the_learners(pages: int, deterministic: bool) -> None:
    """Guards the field's first complaint: over long outputs, odd lengths, page borders and preemptions."""
    generator = make(kv_cache_bytes=cache_of(pages), deterministic=deterministic, prefill_chunk=24)
    differences = []
    for group in generator.generate(mixed()):
        for j, logps in enumerate(group.logps):
            differences.append(np.abs(own_logps(group, j, temperature=1.3) - logps))
    worst, mean = np.concatenate(differences).max(), np.concatenate(differences).mean()
    assert worst <= 1e-4
    assert mean <= 1e-5
    assert (generator.stats.preemptions > 0) == (pages == 21)


def test_bfloat16_agrees_within_its_own_error() -> None:
    """Guards the bound that the documentation states for bfloat16."""
    generator = make(compute_dtype="bfloat16")
    differences = [
        np.abs(own_logps(group, j, temperature=1.3, dtype="bfloat16") - group.logps[j])
        for group in generator.generate(mixed())
        for j in range(2)
    ]
    assert np.concatenate(differences).max() <= 0.25
    assert np.concatenate(differences).mean() <= 0.02


@pytest.mark.parametrize("pages", [21, 400])
def test_greedy_equals_the_full_forward_pass(pages: int) -> None:
    """Guards the cache: every token is the best one of a full pass over the past, ties within the bound excepted."""
    for group in make(kv_cache_bytes=cache_of(pages)).generate(mixed(temperature=0.0, responses=1)):
        table = learner_logps(group.prompt_T, group.responses[0])
        chosen = table[np.arange(len(table)), group.responses[0]]
        assert (table.max(-1) - chosen <= 1e-4).all()
        ties = np.sort(table, -1)[:, -1] - np.sort(table, -1)[:, -2] <= 1e-4
        assert ties.mean() < 0.02
        np.testing.assert_array_equal(group.responses[0][~ties], table.argmax(-1)[~ties])


def arrivals(generator: Generator, requests: list[GenerationRequest], *, seed: int) -> list[Group]:
    """The answers when requests arrive in random order while others run, in the order of `requests`."""
    rng = np.random.default_rng(seed)
    answers: dict[str, Group] = {}
    for i in rng.permutation(len(requests)):
        generator.submit(requests[i])
        for _ in range(rng.integers(0, 12)):
            answers |= {group.id: group for group in generator.step()}
    while generator.unfinished:
        answers |= {group.id: group for group in generator.step()}
    return [answers[request.id] for request in requests]


def test_in_the_deterministic_mode_a_request_decides_its_bits_alone() -> None:
    """Guards reproducibility: alone, together, in random order of arrival, out of memory, or from known prefixes."""
    requests = mixed()
    plenty = make(deterministic=True)
    together = plenty.generate(requests)
    alone = [make(deterministic=True).generate([request])[0] for request in requests]
    again = plenty.generate(requests)  # now its prompts are known
    scarce = make(deterministic=True, kv_cache_bytes=cache_of(21))
    for found in (together, again, arrivals(scarce, requests, seed=1), arrivals(make(deterministic=True), requests, seed=2)):
        assert all(same(a, b) for a, b in zip(alone, found, strict=True))
    assert scarce.stats.preemptions > 0
    assert plenty.stats.cached_prompt_tokens > 0


def test_in_the_fast_mode_company_hardly_matters() -> None:
    """Guards the random stream: tokens differ between runs only where rounding tips a draw."""
    requests = mixed()
    together = make().generate(requests)
    shuffled = arrivals(make(kv_cache_bytes=cache_of(30)), requests, seed=3)
    equal = [
        np.array_equal(a, b)
        for one, other in zip(together, shuffled, strict=True)
        for a, b in zip(one.responses, other.responses, strict=True)
    ]
    assert np.mean(equal) > 0.8


def test_no_more_programs_than_planned() -> None:
    """Guards compile time: a mixed workload uses the shapes of the plan and no others."""
    generator = make(max_batch=12, prefill_chunk=100, compute_dtype="bfloat16")
    for n in range(1, 9):
        generator.generate(mixed()[:n])
        generator.generate([ask(prompt_of(30 * n % 200 + 1, seed=n), num_responses=n, max_tokens=1 + n)])
    assert 0 < generator.stats.compiled_programs <= generator.planned_programs
    before = generator.stats.compiled_programs
    generator.generate(mixed())
    assert generator.stats.compiled_programs == before


def test_the_plan_is_counted_by_what_is_compiled() -> None:
    """Guards the metric itself: a shape of its own costs a program."""
    small, large = make(max_batch=16), make(max_batch=16)
    small.generate([ask([1], max_tokens=2)])
    before = large.stats.compiled_programs
    large.generate([ask([1], max_tokens=2, num_responses=16)])
    assert large.stats.compiled_programs == before + 1


def test_more_responses_than_rows_run_in_waves() -> None:
    """Guards K beyond the batch: one prompt, filled once, answered K times."""
    generator = make(max_batch=4)
    [group] = generator.generate([ask(prompt_of(PAGE + 3), num_responses=19, max_tokens=5, temperature=2.0)])
    assert len(group.responses) == 19
    assert len({r.tobytes() for r in group.responses}) > 15
    assert generator.stats.prompt_tokens == PAGE + 2


def test_what_can_never_fit_is_refused_and_the_rest_goes_on() -> None:
    """Guards the memory budget: a clear message with the numbers, and no effect on others."""
    generator = make(kv_cache_bytes=cache_of(5))
    generator.submit(ask([1, 2, 3], "fits", max_tokens=20))
    with pytest.raises(
        ValueError, match=r"'large': prompt of 30 tokens \+ 20 new ones need 8 pages .* which has 5; raise kv"
    ):
        generator.submit(ask(prompt_of(30), "large", max_tokens=20))
    with pytest.raises(ValueError, match=f"exceeds the {CONFIG.max_positions} positions"):
        generator.submit(ask(prompt_of(250), "long", max_tokens=7))
    groups = []
    while generator.unfinished:
        groups += generator.step()
    assert [len(group.responses[0]) for group in groups] == [20]


def test_a_cancelled_request_frees_its_place() -> None:
    """Guards clients that go away."""
    generator = make()
    for name in ("kept", "gone"):
        generator.submit(ask(prompt_of(20), name, num_responses=3, max_tokens=40))
    generator.step()
    generator.cancel("gone")
    groups = []
    while generator.unfinished:
        groups += generator.step()
    assert [group.id for group in groups] == ["kept"]
    assert generator.stats.running == 0
    assert generator.stats.free_pages == generator.stats.pages


def test_streams_side_by_side_leave_nothing_behind() -> None:
    """Guards a server's memory: the group of a stream that another one finished is nobody's, and is not kept."""
    generator = make()
    short, long = (ask(prompt_of(5, seed=n), f"r{n}", max_tokens=n, seed=n) for n in (3, 30))
    expected = [group.responses[0].tolist() for group in generator.generate([short, long])]
    first = generator.stream(short)
    tokens = [next(first)]
    assert list(generator.stream(long)) == expected[1]
    assert tokens + list(first) == expected[0]
    assert generator.step() == []


def test_a_stream_that_is_cancelled_ends() -> None:
    """Guards its reader against waiting for ever."""
    generator = make(decode_steps=2)
    stream = generator.stream(ask(prompt_of(5), "gone", max_tokens=40))
    assert next(stream) >= 0
    generator.cancel("gone")
    assert len(list(stream)) < 39


def test_a_step_that_fails_gives_up_its_requests_and_no_others() -> None:
    """Guards what follows an error: pages are free, no half-taken request is left, and new ones are answered as ever."""
    request = ask(prompt_of(20), num_responses=2, max_tokens=12, seed=1)
    [expected] = make().generate([request])

    def broken(tokens: list[int]) -> str:
        raise LookupError(f"no text for {tokens}")

    generator = Generator(CONFIG, stop_ids=(), options=EngineOptions(page_size=PAGE, max_batch=8), decode=broken)
    generator.load(PARAMS, policy="p", version=1)
    generator.submit(request)
    with pytest.raises(LookupError, match="no text"):
        generator.generate([ask(prompt_of(9), max_tokens=5, options=SamplingOptions(stop=("x",)))])
    assert (generator.unfinished, generator.stats.running, generator.stats.waiting) == (0, 0, 0)
    assert generator.stats.free_pages == generator.stats.pages
    [found] = generator.generate([request])
    assert same(found, expected)
