"""LoRA adapters held as such: several in one batch, each row with its own, against the learner's program."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from afm_rl.generate import Generator
from afm_rl.lora import attach, init_lora
from tests.generation.toy import CONFIG, PARAMS, ask, make, own_logps, prompt_of

ALPHA = {"tone": 8.0, "mail": 3.0}
RANK = {"tone": 4, "mail": 2}


def lora(name: str, *, scale: float = 0.5) -> dict[str, Any]:
    """An adapter whose b is not zero."""
    rng = np.random.default_rng(len(name) + RANK[name])
    fresh = init_lora(CONFIG, RANK[name], jax.random.key(RANK[name]))
    return jax.tree.map(lambda x: np.asarray(x) + scale * rng.normal(size=x.shape).astype(np.float32) / 4, fresh)


def with_both(**options: object) -> Generator:
    generator = make(max_adapters=2, max_adapter_rank=4, **options)
    for name in ALPHA:
        generator.load_adapter(name, lora(name), alpha=ALPHA[name], rank=RANK[name])
    return generator


@pytest.mark.slow
def test_rows_of_one_batch_use_their_own_adapters() -> None:
    """Guards the bank: log-probabilities of the base and of two adapters in one batch are the learner's of each."""
    generator = with_both()
    requests = [
        ask(prompt_of(20), name, num_responses=2, max_tokens=20, seed=i, adapter=adapter)
        for i, (name, adapter) in enumerate([("r0", "tone"), ("r1", ""), ("r2", "mail"), ("r3", "tone")])
    ]
    params = {name: attach(PARAMS, lora(name), alpha=ALPHA[name], rank=RANK[name]) for name in ALPHA} | {"": PARAMS}
    groups = generator.generate(requests)
    for request, group in zip(requests, groups, strict=True):
        for j, logps in enumerate(group.logps):
            np.testing.assert_allclose(logps, own_logps(group, j, params=params[request.adapter]), atol=1e-4)
            other = own_logps(group, j, params=params["mail" if request.adapter != "mail" else "tone"])
            assert np.abs(logps - other).max() > 0.05
    assert len({group.responses[0].tobytes() for group in groups}) == 4


def test_a_prefix_is_known_to_its_own_adapter_only() -> None:
    """Guards the prefix cache: the same prompt under another adapter, or a reloaded one, has other keys and values."""
    generator = with_both()

    def filled(adapter: str) -> int:
        before = generator.stats.prompt_tokens
        generator.generate([ask(prompt_of(33), adapter=adapter, max_tokens=2)])
        return generator.stats.prompt_tokens - before

    assert [filled(a) for a in ("tone", "tone", "mail", "", "")] == [32, 0, 32, 32, 0]
    generator.load_adapter("tone", lora("tone", scale=0.1), alpha=1.0, rank=4)
    assert filled("tone") == 32


def test_a_dropped_adapter_leaves_nothing_behind() -> None:
    """Guards a place that is used again by an adapter of lower rank."""
    generator = with_both()
    generator.drop_adapter("tone")
    assert generator.adapters == ["mail"]
    generator.load_adapter("small", lora("mail"), alpha=ALPHA["mail"], rank=2)
    [small, mail] = generator.generate([ask(prompt_of(9), adapter=a, max_tokens=9) for a in ("small", "mail")])
    np.testing.assert_array_equal(small.responses[0], mail.responses[0])
    np.testing.assert_allclose(small.logps[0], mail.logps[0], atol=1e-5)


def test_adapters_that_cannot_be_held_are_refused() -> None:
    """Guards clear errors; what is held stays held, and what is in use stays as it is."""
    generator = with_both()
    with pytest.raises(ValueError, match="all 2 places are taken by tone, mail"):
        generator.load_adapter("third", lora("mail"), alpha=1.0, rank=2)
    with pytest.raises(ValueError, match="rank 5; this engine holds ranks 1 to 4"):
        generator.load_adapter("tone", init_lora(CONFIG, 5, jax.random.key(0)), alpha=1.0, rank=5)
    with pytest.raises(ValueError, match=r"a of 'down' is \(2, 4, 32\), the model needs \(2, 3, 32\)"):
        generator.load_adapter("tone", lora("tone"), alpha=1.0, rank=3)
    broken = lora("tone")
    broken["layers"]["up"]["b"][0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite \\(b of 'up'\\)"):
        generator.load_adapter("tone", broken, alpha=1.0, rank=4)
    with pytest.raises(ValueError, match="'r': unknown adapter 'none'; held: tone, mail"):
        generator.submit(ask([1], adapter="none"))
    with pytest.raises(ValueError, match="holds no adapters: set max_adapters"):
        make().load_adapter("tone", lora("tone"), alpha=1.0, rank=4)
    generator.submit(ask([1], adapter="tone"))
    for call in (
        lambda: generator.drop_adapter("tone"),
        lambda: generator.load_adapter("tone", lora("tone"), alpha=1, rank=4),
    ):
        with pytest.raises(ValueError, match="'tone' is in use by 1 requests"):
            call()
