"""Speculation in the engine: what is written stays as it was, in token or in distribution; guesses are kept and counted."""

from __future__ import annotations

import numpy as np
import pytest

from afm_rl.generate import Generator, NoWeightsError
from afm_rl.generation.options import EngineOptions, Speculation
from afm_rl.types import GenerationRequest, SamplingOptions
from tests.generation.toy import CONFIG, PARAMS, ask, cache_of, make, own_logps, prompt_of, random_params

DRAFT_CONFIG = CONFIG.replace(num_layers=1, ffn_dim=24)
NGRAM = Speculation(kind="ngram", tokens=4)
DRAFT = Speculation(kind="draft", tokens=3)


def drafting(draft: dict, config=CONFIG, **options: object) -> Generator:  # type: ignore[no-untyped-def]
    generator = make(speculative=DRAFT, **options)
    generator.load_draft(draft, config)
    return generator


def requests(*, temperature: float = 0.9, count: int = 6) -> list[GenerationRequest]:
    """Prompts that repeat themselves, as what n-grams are good at."""
    return [
        ask(
            np.tile(prompt_of(5 + i, seed=i), 4),
            f"r{i}",
            num_responses=2,
            max_tokens=20 + 7 * i,
            seed=i,
            temperature=temperature,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(("temperature", "pages"), [(0.0, 400), (0.9, 21)])
def test_ngrams_change_no_token(temperature: float, pages: int) -> None:
    """Guards verification by n-grams: the tokens of plain decoding with the same seeds, also out of memory."""
    plain = make(kv_cache_bytes=cache_of(pages)).generate(requests(temperature=temperature))
    generator = make(speculative=NGRAM, kv_cache_bytes=cache_of(pages))
    equal = []
    for one, other in zip(plain, generator.generate(requests(temperature=temperature)), strict=True):
        equal += [np.array_equal(a, b) for a, b in zip(one.responses, other.responses, strict=True)]
        for j, logps in enumerate(other.logps):
            np.testing.assert_allclose(logps, own_logps(other, j, temperature=temperature or 1.0), atol=1e-4)
    assert np.mean(equal) > 0.9  # rounding may tip a draw
    stats = generator.stats
    assert 0 < stats.kept_tokens <= stats.guessed_tokens
    assert stats.response_tokens >= stats.kept_tokens + stats.verified_rows
    assert stats.free_pages == stats.pages


@pytest.mark.slow
def test_a_draft_equal_to_the_target_is_always_right() -> None:
    """Guards the draft's cache: after any number of kept guesses it holds what the target holds."""
    generator = drafting(PARAMS)
    for group in generator.generate(requests()):
        for j, logps in enumerate(group.logps):
            np.testing.assert_allclose(logps, own_logps(group, j, temperature=0.9), atol=1e-4)
    assert generator.stats.kept_tokens > 0.97 * generator.stats.guessed_tokens
    again = drafting(PARAMS, kv_cache_bytes=cache_of(21))
    again.generate(requests())
    assert again.stats.preemptions > 0
    assert again.stats.kept_tokens > 0.97 * again.stats.guessed_tokens


@pytest.mark.slow
def test_greedy_with_any_draft_equals_the_full_forward_pass() -> None:
    """Guards what is kept of a bad draft: at temperature 0, the target's best tokens and nothing else."""
    plain = make().generate(requests(temperature=0.0))
    generator = drafting(random_params(seed=3, config=DRAFT_CONFIG), DRAFT_CONFIG)
    for one, other in zip(plain, generator.generate(requests(temperature=0.0)), strict=True):
        for a, b in zip(one.responses, other.responses, strict=True):
            np.testing.assert_array_equal(a, b)
    assert generator.stats.kept_tokens < generator.stats.guessed_tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [SamplingOptions(), SamplingOptions(top_p=0.97, repetition_penalty=1.2, logit_bias={2: 0.5})]
)
@pytest.mark.parametrize("draft", [True, False])
def test_three_tokens_are_distributed_as_without_speculation(draft: bool, options: SamplingOptions) -> None:
    """Guards the whole path by chi-square over all sequences of a model of four tokens, against plain decoding."""
    config = CONFIG.replace(vocab_size=4)
    params, small = random_params(seed=1, config=config, scale=1.2), random_params(seed=2, config=config, scale=1.2)
    draws = 2000
    speculative = DRAFT if draft else NGRAM
    request = ask([1, 3, 1, 3, 1], num_responses=draws, max_tokens=4, seed=8, options=options)
    counts = []
    for chosen in (speculative, None):
        generator = Generator(
            config, stop_ids=(), options=EngineOptions(max_batch=256, page_size=8, speculative=chosen, kv_cache_bytes=2**24)
        )
        generator.load(params, policy="p", version=0)
        if chosen is DRAFT:
            generator.load_draft(small, config)
        other = ask(request.prompt_T, num_responses=draws, max_tokens=4, seed=8 if chosen else 9, options=options)
        [group] = generator.generate([other])
        counts.append(np.bincount(np.stack(group.responses)[:, :3] @ [16, 4, 1], minlength=64))
    found, expected = counts
    both = found + expected
    common = both >= 10
    statistic = ((found - expected) ** 2 / np.maximum(both, 1))[common].sum()
    degrees = common.sum() - 1
    assert degrees > 8
    assert statistic < degrees + 3.3 * np.sqrt(2 * degrees) + 4  # beyond the 99.9 % quantile


@pytest.mark.slow
def test_ends_limits_and_alternatives_hold_within_a_pass() -> None:
    """Guards a pass that brings several tokens: it ends at a stop token and at the limit, and reports every token."""
    options = SamplingOptions(logprobs=2, top_k=20, logit_bias={3: 2.5})
    some = [
        ask(np.tile(prompt_of(4, seed=s), 5), f"r{s}", num_responses=3, max_tokens=17, seed=s, options=options)
        for s in range(4)
    ]
    for generator in (make((3,), speculative=NGRAM), drafting(PARAMS)):
        generator.stop_ids = (3,)
        ended = []
        for group in generator.generate(some):
            for tokens, finished, top in zip(group.responses, group.finished, group.top, strict=True):
                assert (tokens == 3).sum() == finished
                assert len(tokens) == 17 or finished
                assert top.ids_TN.shape == (len(tokens), 2)
                ended.append(finished)
        assert 0 < sum(ended) < len(ended)
        assert generator.stats.compiled_programs <= generator.planned_programs


def test_what_cannot_speculate_is_refused() -> None:
    """Guards clear errors: no draft loaded, another vocabulary, the deterministic mode."""
    with pytest.raises(NoWeightsError, match="load_draft"):
        make(speculative=DRAFT).generate([ask([1])])
    with pytest.raises(ValueError, match="knows 50 tokens, the policy 97"):
        drafting(PARAMS, CONFIG.replace(vocab_size=50))
    with pytest.raises(ValueError, match="does not speculate with a draft model"):
        make(speculative=NGRAM).load_draft(PARAMS, CONFIG)
    with pytest.raises(ValueError, match="exclude each other"):
        EngineOptions(deterministic=True, speculative=NGRAM)
