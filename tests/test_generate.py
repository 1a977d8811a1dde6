"""Generation: what the facade promises; draws follow the distribution, responses end where they must.

How the engine behaves under load is tested in tests/generation/.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.config import ModelConfig
from afm_rl.generate import Generator, NoWeightsError, request_seed
from afm_rl.generation.options import EngineOptions
from afm_rl.model import forward, logits
from afm_rl.parameters import Params, ParamSpec, param_specs
from afm_rl.types import GenerationRequest, Group, SamplingOptions

CONFIG = ModelConfig(11, 8, 16, 2, 4, 2, 4, max_positions=48)
STOP, NEVER = 3, -1
PROMPTS = tuple(np.array(p, np.int32) for p in ([5, 1, 7], [2, 9, 9, 4, 0, 6, 8], [10]))


def random_params(config: ModelConfig, scale: float = 3.0) -> Params:
    """Weights larger than at the start of training, so that greedy decoding is not decided by rounding."""
    rng = np.random.default_rng(0)

    def draw(spec: ParamSpec) -> np.ndarray:
        values = np.ones(spec.shape) if spec.std is None else scale * spec.std * rng.normal(size=spec.shape)
        return values.astype(np.float32)

    return jax.tree.map(draw, param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))


PARAMS = random_params(CONFIG)


@jax.jit
def full_logits(tokens_BT: jax.Array) -> jax.Array:
    hidden = forward(PARAMS, tokens_BT, config=CONFIG)
    return logits(PARAMS, hidden, CONFIG)


def full_logps(group: Group, response: int, temperature: float) -> np.ndarray:
    """log p [T, V] of every next token of a response, by the full forward pass and a float64 softmax."""
    tokens = np.concatenate([group.prompt_T, group.responses[response]])
    padded = np.zeros((1, 48), np.int32)
    padded[0, : len(tokens)] = tokens
    rows = np.asarray(full_logits(padded), np.float64)[0, len(group.prompt_T) - 1 : len(tokens) - 1] / temperature
    return rows - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)) - rows.max(-1, keepdims=True)


def ask(prompt: Sequence[int] | np.ndarray, name: str = "r", **options: object) -> GenerationRequest:
    return GenerationRequest(name, np.asarray(prompt, np.int32), **options)  # type: ignore[arg-type]


def make(stop_ids: Sequence[int] = (STOP, NEVER)) -> Generator:
    generator = Generator(CONFIG, stop_ids=stop_ids, options=EngineOptions(max_batch=8))
    generator.load(PARAMS, policy="sft", version=7)
    return generator


@pytest.fixture(scope="module")
def generator() -> Generator:
    return make()


def test_greedy_equals_the_full_forward_pass() -> None:
    """Guards the cache: prompts of several lengths in one batch, each token the argmax of a full pass over the past."""
    requests = [ask(p, max_tokens=16, temperature=0.0, num_responses=2) for p in PROMPTS]
    for group in make((NEVER, NEVER)).generate(requests):
        assert not any(group.finished)
        np.testing.assert_array_equal(group.responses[0], group.responses[1])
        expected = full_logps(group, 0, 1.0)
        np.testing.assert_array_equal(group.responses[0], expected.argmax(-1))
        np.testing.assert_allclose(group.logps[0], expected.max(-1), atol=1e-4)


def test_log_probabilities_agree_with_the_full_forward_pass(generator: Generator) -> None:
    """Guards what the learner compares with its own: log p at each request's own temperature."""
    requests = [
        ask(p, max_tokens=16, temperature=t, seed=i, num_responses=2)
        for i, (p, t) in enumerate(zip(PROMPTS, (0.7, 1.0, 1.6), strict=True))
    ]
    groups = generator.generate(requests)
    for request, group in zip(requests, groups, strict=True):
        for j, response in enumerate(group.responses):
            expected = np.take_along_axis(full_logps(group, j, request.temperature), response[:, None], axis=1)[:, 0]
            np.testing.assert_allclose(group.logps[j], expected, atol=1e-4)
    assert len({r.tobytes() for g in groups for r in g.responses}) == 6


def test_responses_end_at_the_stop_token_or_at_max_tokens(generator: Generator) -> None:
    """Guards the lengths: one stop token, at the end and counted once; without one the limit is exact."""
    limits = (2, 5, 16)
    requests = [ask(PROMPTS[0], max_tokens=n, temperature=2.0, seed=s, num_responses=2) for s in range(24) for n in limits]
    seen = set()
    for request, group in zip(requests, generator.generate(requests), strict=True):
        for response, logps, finished in zip(group.responses, group.logps, group.finished, strict=True):
            assert len(response) == len(logps) <= request.max_tokens
            assert (response == STOP).sum() == int(finished)
            assert response[-1] == STOP if finished else len(response) == request.max_tokens
            assert (logps < 0).all()
            seen.add((request.max_tokens, finished))
    assert seen == {(n, finished) for n in limits for finished in (True, False)}


def test_a_limit_and_a_stop_id_only_cut(generator: Generator) -> None:
    """Guards the random stream: one draw a token, whatever ends the response."""
    free, stopped = (
        g.generate([ask(PROMPTS[1], max_tokens=n, temperature=2.0, seed=s, num_responses=2) for s in range(3)])
        for g, n in ((make((NEVER, NEVER)), 16), (generator, 9))
    )
    for whole, cut in zip(free, stopped, strict=True):
        for long, short in zip(whole.responses, cut.responses, strict=True):
            np.testing.assert_array_equal(long[: len(short)], short)


def test_several_stop_ids() -> None:
    """Guards chat and plain completions, which end at different tokens."""
    requests = [ask(PROMPTS[0], max_tokens=16, temperature=2.0, seed=s, num_responses=2) for s in range(8)]
    groups = make((STOP, 8)).generate(requests)
    last = {int(r[-1]) for g in groups for r, finished in zip(g.responses, g.finished, strict=True) if finished}
    assert last == {STOP, 8}
    assert not any(np.isin(r[:-1], (STOP, 8)).any() for g in groups for r in g.responses)


@pytest.mark.parametrize(("temperature", "prompt"), [(0.0, 0), (1.3, 0), (1.3, 1)])
def test_a_stream_gives_the_tokens_of_generate(generator: Generator, temperature: float, prompt: int) -> None:
    """Guards the server: a stream is a request like any other, and it ends at the stop token."""
    for seed in range(3):
        request = ask(PROMPTS[prompt], max_tokens=11, temperature=temperature, seed=seed)
        whole = generator.generate([request])[0]
        assert list(generator.stream(request)) == whole.responses[0].tolist()


def test_streamed_tokens_are_counted() -> None:
    """Guards the server's counters: a stream that ended, and one whose reader went away."""
    generator = make()
    request = ask(PROMPTS[0], max_tokens=11, temperature=1.3)
    tokens = list(generator.stream(request))
    assert (generator.stats.prompt_tokens, generator.stats.response_tokens) == (2, len(tokens))
    left = generator.stream(request)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert (generator.stats.prompt_tokens, generator.unfinished, generator.stats.running) == (4, 0, 0)


def test_batch_mates_do_not_change_a_response(generator: Generator) -> None:
    """Guards the identity of a response: (weights, prompt, seed, j) decide it, not what shares its batch."""
    mine = ask(PROMPTS[1], "mine", max_tokens=16, temperature=1.2, seed=5, num_responses=2)
    answers = []
    for others in ([PROMPTS[0], PROMPTS[2]], [PROMPTS[2], PROMPTS[1][::-1]]):
        mates = [ask(p, max_tokens=12, temperature=t, seed=9, num_responses=2) for p, t in zip(others, (0, 2), strict=True)]
        answers.append(generator.generate([mates[0], mine, mates[1]])[1])
    for first, second in zip(answers[0].responses, answers[1].responses, strict=True):
        np.testing.assert_array_equal(first, second)
    for first, second in zip(answers[0].logps, answers[1].logps, strict=True):
        np.testing.assert_array_equal(first, second)


def test_answers_come_in_order_across_batches() -> None:
    """Guards a mix of shapes and more requests than one batch holds; answers carry policy and version."""
    requests = [
        ask(PROMPTS[i % 3], f"r{i}", max_tokens=3, temperature=0.0, num_responses=1 if i == 2 else 2, seed=i)
        for i in range(8)
    ]
    generator = make()
    groups = generator.generate(requests)
    assert [g.id for g in groups] == [r.id for r in requests]
    assert [len(g.responses) for g in groups] == [r.num_responses for r in requests]
    assert {(g.policy, g.version) for g in groups} == {("sft", 7)}
    for request, group in zip(requests, groups, strict=True):
        np.testing.assert_array_equal(group.prompt_T, request.prompt_T)
        np.testing.assert_array_equal(group.responses[0], full_logps(group, 0, 1.0).argmax(-1))
    assert generator.stats.response_tokens == sum(len(r) for g in groups for r in g.responses)


TOY, DRAWS = ModelConfig(6, 4, 8, 1, 1, 1, 4, max_positions=48), 4096


def draw(params: Params, request: GenerationRequest) -> np.ndarray:
    """[DRAWS, T] tokens of a model of six tokens."""
    generator = Generator(TOY, stop_ids=(), options=EngineOptions(max_batch=DRAWS))
    generator.load(params, policy="p", version=0)
    return np.stack(generator.generate([request])[0].responses)


def test_draws_follow_the_distribution() -> None:
    """Guards inverse-CDF sampling over two tokens (chi-square, 35 degrees of freedom): each token has its own draw."""
    params, prompt, temperature = random_params(TOY, scale=1.5), [1, 4, 2], 1.4
    counts = np.zeros((6, 6))
    request = ask(prompt, max_tokens=2, temperature=temperature, num_responses=DRAWS, seed=1)
    np.add.at(counts, tuple(draw(params, request).T), 1)

    rows = np.array([[*prompt, v] for v in range(6)])
    scores = jax.jit(lambda p: logits(p, forward(p, jnp.asarray(rows), config=TOY), TOY))(params)
    scores = np.asarray(scores, np.float64)[:, 2:] / temperature
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = DRAWS * p[0, 0][:, None] * p[:, 1]
    assert ((counts - expected) ** 2 / expected).sum() < 66.6  # the 99.9 % quantile
    assert expected.min() > 5
    assert expected.max() > 3 * expected.min()


def test_a_token_without_probability_is_never_drawn() -> None:
    """Guards both ends of the cumulative sum: the first and the last token are impossible here."""
    params = random_params(TOY, scale=0.0)
    params["embed"]["weight"][:, 0] = [-400.0, 1.0, 1.0, 1.0, 1.0, -400.0]
    tokens = draw(params, ask([1], max_tokens=16, num_responses=DRAWS))
    np.testing.assert_array_equal(np.unique(tokens), [1, 2, 3, 4])


def test_seeds_and_responses_have_their_own_streams(generator: Generator) -> None:
    """Guards against the same answer G times, and against seeds that overlap."""
    requests = [ask(PROMPTS[0], max_tokens=16, temperature=3.0, seed=s, num_responses=2) for s in (0, 1, 2**32 - 1)]
    first, again = (generator.generate(requests) for _ in range(2))
    assert len({r[:4].tobytes() for g in first for r in g.responses}) == 6
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.concatenate(a.responses), np.concatenate(b.responses))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask([]), "empty prompt"),
        (ask([1], max_tokens=1, num_responses=0), "num_responses and max_tokens must be at least 1"),
        (ask([1], max_tokens=0), "num_responses and max_tokens must be at least 1"),
        (ask([1], max_tokens=1, temperature=-1.0), "temperature not negative"),
        (ask([1] * 44, max_tokens=5), "44 tokens \\+ 5 new ones exceeds the 48 positions of a context"),
        (ask([1], max_tokens=1, temperature=float("nan")), "temperature not negative"),
        (ask([1, 11], max_tokens=1), "token ids outside 0..10"),
        (ask([1], max_tokens=1, adapter="tone"), "unknown adapter 'tone'; held: none"),
        (ask([1], max_tokens=1, options=SamplingOptions(stop=("x",))), "stop strings need a tokenizer"),
        (ask([1], max_tokens=1, options=SamplingOptions(stop_ids=tuple(range(33)))), "tokens end a response; at most"),
        (ask([1], max_tokens=1, options=SamplingOptions(top_p=1.5)), "top_p"),
    ],
)
def test_impossible_requests_are_refused(generator: Generator, request_: GenerationRequest, message: str) -> None:
    """Guards every limit, by a message that names the request and the numbers, in both ways of asking."""
    with pytest.raises(ValueError, match=f"'r'.*{message}"):
        generator.generate([ask([1], max_tokens=1), request_])
    with pytest.raises(ValueError, match=message):
        next(generator.stream(request_))


def test_nothing_is_generated_before_weights_arrive() -> None:
    """Guards against answers of random weights; weights that are not finite do not replace good ones."""
    generator = Generator(CONFIG, stop_ids=(STOP,))
    with pytest.raises(NoWeightsError, match="load"):
        generator.generate([ask([1])])
    broken = {**PARAMS, "final_norm": np.full(8, np.nan, np.float32)}
    with pytest.raises(ValueError, match="'dpo' version 2 hold values that are not finite"):
        generator.load(broken, policy="dpo", version=2)
    with pytest.raises(NoWeightsError):
        generator.generate([ask([1])])


def test_the_longest_request_fits() -> None:
    """Guards the last position: prompt and response that fill their buckets and the model exactly."""
    requests = [ask(np.arange(32) % 11, max_tokens=16, temperature=0.0, num_responses=2)] * 4
    group = make((NEVER, NEVER)).generate(requests)[3]
    np.testing.assert_array_equal(group.responses[1], full_logps(group, 1, 1.0).argmax(-1))


@pytest.mark.slow
def test_bfloat16_generation_is_close() -> None:
    """Guards the type of the cache: float32 log-probabilities within bfloat16's error of the float32 ones."""
    low = Generator(CONFIG, stop_ids=(NEVER, NEVER), options=EngineOptions(max_batch=8, compute_dtype="bfloat16"))
    low.load(random_params(CONFIG, scale=1.0), policy="p", version=0)
    exact = make((NEVER, NEVER))
    exact.load(random_params(CONFIG, scale=1.0), policy="p", version=0)
    requests = [ask(p, max_tokens=4, temperature=1.0, num_responses=2, seed=2) for p in (*PROMPTS, PROMPTS[0])]
    for found, expected in zip(low.generate(requests), exact.generate(requests), strict=True):
        assert found.logps[0].dtype == np.float32
        np.testing.assert_allclose(found.logps[0][0], expected.logps[0][0], atol=0.1)


def test_request_seeds_are_stable() -> None:
    """Guards resume and launchers: a fixed function of its parts, unlike Python's salted hash."""
    assert request_seed("mdloo", 3, "p-1") == 582445347
    assert request_seed("a", 1) != request_seed("a", 2)
    assert 0 <= request_seed(()) < 2**32
