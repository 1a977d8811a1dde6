"""Sampling options through the whole engine: what ends a response, what is cut, what is reported."""

from __future__ import annotations

import numpy as np
import pytest

from afm_rl.generate import Generator
from afm_rl.generation.options import EngineOptions
from afm_rl.types import GenerationRequest, Group, SamplingOptions
from tests.generation.toy import CONFIG, PARAMS, ask, cache_of, learner_logps, make, own_logps, prompt_of

EVERY = SamplingOptions(
    top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.3, min_tokens=3, logit_bias={5: 2.0, 9: -50.0}, logprobs=4
)


def words(tokens: list[int]) -> str:
    """A text in which every token is a word of its own."""
    return "".join(f" w{token}" for token in tokens)


def spelling() -> Generator:
    generator = Generator(CONFIG, stop_ids=(3,), options=EngineOptions(page_size=8, max_batch=8), decode=words)
    generator.load(PARAMS, policy="p", version=0)
    return generator


def both(request: GenerationRequest) -> list[Group]:
    """The answer of the fast and of the deterministic mode."""
    return [make((3,), deterministic=mode).generate([request])[0] for mode in (False, True)]


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it() -> None:
    """Guards stop strings across tokens, cut after the fact: the same tokens as without, up to the one that completes it."""
    request = ask(prompt_of(10), max_tokens=60, seed=4, temperature=1.2, options=SamplingOptions(ignore_stop=True))
    [free] = make().generate([request])
    tokens = free.responses[0].tolist()
    stop = words(tokens[20:22])[2:]  # from within one token to the end of the next
    end = next(n for n in range(61) if stop in words(tokens[:n]))
    assert 1 < end <= 22
    options = SamplingOptions(stop=(stop, "never"), ignore_stop=True)
    [cut] = spelling().generate([ask(prompt_of(10), max_tokens=60, seed=4, temperature=1.2, options=options)])
    assert cut.responses[0].tolist() == tokens[:end]
    assert len(cut.logps[0]) == end
    assert cut.finished == (True,)


def test_stop_ids_minimum_and_ignored_ends() -> None:
    """Guards the ends of a response: the policy's, the request's, none before `min_tokens`, none where they are ignored."""
    bias = {3: 9.0, 7: 9.0}
    for wanted, options in {
        (3,): SamplingOptions(logit_bias=bias, min_tokens=6),
        (3, 7): SamplingOptions(logit_bias=bias, min_tokens=6, stop_ids=(7,)),
        (7,): SamplingOptions(logit_bias=bias, min_tokens=6, stop_ids=(7,), ignore_stop=True),
        (): SamplingOptions(logit_bias=bias, min_tokens=6, ignore_stop=True),
    }.items():
        for group in both(ask(prompt_of(5), num_responses=6, max_tokens=40, temperature=1.5, options=options)):
            for tokens, finished in zip(group.responses, group.finished, strict=True):
                ends = np.flatnonzero(np.isin(tokens, wanted))
                assert finished == (len(ends) > 0)
                assert len(tokens) == (ends[0] + 1 if finished else 40)
                assert not finished or len(tokens) > 6
            assert any(group.finished) == bool(wanted)


def test_reported_figures_are_the_models_own_whatever_was_cut() -> None:
    """Guards log-probabilities and alternatives: at the request's temperature, untouched by bias, penalty and cuts."""
    request = ask(prompt_of(20), num_responses=2, max_tokens=30, temperature=0.8, seed=2, options=EVERY)
    for group in both(request):
        for j, tokens in enumerate(group.responses):
            table = learner_logps(group.prompt_T, tokens, temperature=0.8)
            np.testing.assert_allclose(group.logps[j], own_logps(group, j, temperature=0.8), atol=1e-4)
            assert group.top[j].ids_TN.shape == group.top[j].logps_TN.shape == (len(tokens), 4)
            np.testing.assert_allclose(group.top[j].logps_TN, -np.sort(-table)[:, :4], atol=1e-4)
            np.testing.assert_allclose(np.take_along_axis(table, group.top[j].ids_TN, 1), group.top[j].logps_TN, atol=1e-4)
            assert 9 not in tokens


def test_a_plain_request_beside_others_stays_the_same() -> None:
    """Guards a row's independence from the options of others, in both modes."""
    plain = ask(prompt_of(12), "plain", num_responses=2, max_tokens=20, seed=1)
    other = ask(prompt_of(9, seed=1), "other", num_responses=2, max_tokens=20, seed=3, options=EVERY)
    for mode in (False, True):
        alone = {g.id: g for r in (plain, other) for g in make(deterministic=mode).generate([r])}
        together = {g.id: g for g in make(deterministic=mode).generate([plain, other])}
        for name, group in together.items():
            for one, two in zip(group.responses, alone[name].responses, strict=True):
                np.testing.assert_array_equal(one, two)


def test_repetition_is_penalised_over_prompt_and_response() -> None:
    """Guards the tokens that count as seen, in every step of the loop on the device."""
    options = SamplingOptions(repetition_penalty=1e9)
    for group in both(ask(prompt_of(6), max_tokens=50, temperature=0.0, options=options)):
        written = [*group.prompt_T.tolist(), *group.responses[0].tolist()]
        assert len(set(written)) == len(written)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("length", [1, 2, 9, 60])
def test_a_prompts_log_probabilities(length: int, deterministic: bool) -> None:
    """Guards scoring across chunks and known prefixes: every prompt token given those before it, and the best ones."""
    generator = make(prefill_chunk=16, deterministic=deterministic)
    prompt = prompt_of(length, seed=7)
    generator.generate([ask(prompt, max_tokens=2)])  # its prefix is known now
    expected = learner_logps(prompt[:1], prompt[1:])
    for tokens in (0, 3):
        request = ask(prompt, max_tokens=tokens, options=SamplingOptions(prompt_logprobs=3, ignore_stop=True))
        [group] = generator.generate([request])
        assert len(group.responses[0]) == tokens
        assert group.prompt_logp_T is not None
        assert group.prompt_top is not None
        assert np.isnan(group.prompt_logp_T[0])
        np.testing.assert_allclose(group.prompt_logp_T[1:], expected[np.arange(length - 1), prompt[1:]], atol=1e-4)
        np.testing.assert_allclose(group.prompt_top.logps_TN[1:], -np.sort(-expected)[:, :3], atol=1e-4)
    assert generator.stats.free_pages == generator.stats.pages


def test_a_request_for_no_tokens_may_ask_for_alternatives() -> None:
    """Guards the other answers of a step: a response without tokens has alternatives of no token, and is no error."""
    generator = make()
    generator.submit(ask(prompt_of(9), "none", max_tokens=0, options=SamplingOptions(prompt_logprobs=0, logprobs=3)))
    generator.submit(ask(prompt_of(2), "one", max_tokens=1))
    groups = {}
    while generator.unfinished:
        groups |= {group.id: group for group in generator.step()}
    assert set(groups) == {"none", "one"}
    assert len(groups["none"].top[0].ids_TN) == len(groups["none"].responses[0]) == 0


def test_a_prompt_of_one_token_has_no_log_probabilities_to_compute() -> None:
    """Guards responses that are filled again after they gave up their pages: they are no part of the prompt's scores."""
    options = SamplingOptions(prompt_logprobs=2)
    requests = [ask([n], f"r{n}", max_tokens=60, num_responses=3, seed=n, options=options) for n in range(3)]
    generator = make(kv_cache_bytes=cache_of(17))
    groups = generator.generate(requests)
    assert generator.stats.preemptions > 0
    for group in groups:
        np.testing.assert_array_equal(group.prompt_logp_T, [np.nan])
        assert max(np.abs(own_logps(group, j) - group.logps[j]).max() for j in range(3)) < 1e-4
