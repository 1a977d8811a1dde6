"""The training step on problems with known answers: what moves, what does not, and which random key it draws from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afm_rl.config import ModelConfig
from afm_rl.optimizer import adamw
from afm_rl.packing import microbatches
from afm_rl.parameters import init_params
from afm_rl.policy_losses import build
from afm_rl.schedules import constant
from afm_rl.training import (
    Batch,
    TrainState,
    add_up,
    create_state,
    make_accumulated_step,
    make_train_step,
    to_floats,
)


def pull(params: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Half the squared distance of `x` to what the batch asks for, times a frozen weight; the gradient is known."""
    error = params["x"] - batch["target"]
    return 0.5 * (frozen["weight"] * error**2).sum(), {"noise": jax.random.uniform(key)}


def test_one_step_of_gradient_descent_by_hand() -> None:
    """Guards the direction, the gradient norm before any clipping, and the loss before the step."""
    optimizer = optax.sgd(0.5)
    state = create_state({"x": np.array([1.0, 5.0], np.float32)}, optimizer)
    frozen, batch = {"weight": jnp.array([3.0, 4.0])}, {"target": np.array([0.0, 4.0], np.float32)}
    state, metrics = make_train_step(pull, optimizer)(state, frozen, batch)
    np.testing.assert_allclose(state.params["x"], [1 - 0.5 * 3, 5 - 0.5 * 4])
    np.testing.assert_array_equal(frozen["weight"], [3.0, 4.0])
    assert int(state.step) == 1
    values = to_floats(metrics)
    assert (values["loss"], values["grad_norm"]) == (3.5, 5.0)
    assert all(type(value) is float for value in values.values())


def test_the_callers_parameters_survive() -> None:
    """Guards donation: the step may destroy its state, never what the state was made from."""
    optimizer = optax.adam(0.1)
    params = {"x": jnp.ones(2)}
    step = make_train_step(pull, optimizer)
    state = create_state(params, optimizer)
    state, _ = step(state, {"weight": 1.0}, {"target": np.zeros(2, np.float32)})
    np.testing.assert_array_equal(params["x"], 1.0)
    assert np.all(np.asarray(state.params["x"]) < 1.0)


def test_the_random_key_is_the_steps() -> None:
    """Guards exact resume: step n draws the same noise in a run that starts at n, another in step n + 1."""
    optimizer = optax.sgd(0.0)
    batch = {"target": np.zeros(1, np.float32)}

    def noises(start: int, seed: int) -> list[float]:
        step = make_train_step(pull, optimizer, seed=seed)
        state = create_state({"x": jnp.zeros(1)}, optimizer).replace(step=jnp.int32(start))
        found = []
        for _ in range(start, 4):
            state, metrics = step(state, {"weight": 1.0}, batch)
            found.append(to_floats(metrics)["noise"])
        return found

    whole = noises(0, seed=1)
    assert noises(2, seed=1) == whole[2:]
    assert len(set(whole)) == 4
    assert noises(3, seed=2) != whole[3:]


def test_what_an_objective_measures_wins_over_the_default() -> None:
    """Guards metrics: an objective may name its own loss or norm."""

    def loss(params: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del frozen, key
        return (params["x"] * batch["y"]).sum(), {"loss": jnp.float32(7.0)}

    optimizer = optax.sgd(1.0)
    state = create_state({"x": jnp.ones(1)}, optimizer)
    state, metrics = make_train_step(loss, optimizer)(state, {}, {"y": np.ones(1, np.float32)})
    assert to_floats(metrics) == {"loss": 7.0, "grad_norm": 1.0}
    assert isinstance(state, TrainState)


def test_only_scalars_are_metrics() -> None:
    """Guards the metric files."""
    with pytest.raises(TypeError):
        to_floats({"loss": np.ones(2)})


CONFIG = ModelConfig(19, 8, 16, 1, 2, 1, 4)


def uneven_batch() -> dict[str, np.ndarray]:
    """Six rows with 1 to 11 targets each: microbatches with very different numbers of tokens."""
    rng = np.random.default_rng(0)
    t, length = np.arange(12), np.array([2, 12, 3, 11, 4, 7])
    return {
        "tokens_BT": rng.integers(0, 19, (6, 12)).astype(np.int32),
        "mask_BT": ((t > 0) & (t < length[:, None])).astype(np.float32),
        "ref_logp_B": rng.normal(-20, 5, 6).astype(np.float32),
    }


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("supervised", {"z_loss": 0.01}),
        pytest.param("dpo", {"beta": 0.1}, marks=pytest.mark.slow),
        pytest.param("ipo", {"beta": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_microbatches_make_the_big_batchs_update(objective: str, options: dict[str, float]) -> None:
    """Guards the weights of the shares: by target tokens (a mean of means fails here), by pairs for preferences."""
    loss, optimizer = build(objective, CONFIG, options), adamw(peak_lr=0.1, schedule=constant())
    params, batch = init_params(CONFIG, jax.random.key(0)), uneven_batch()
    parts = microbatches(batch, max_tokens=24, pairs=objective != "supervised")
    assert len(parts) == 3
    whole, metrics = make_train_step(loss, optimizer)(create_state(params, optimizer), {}, batch)
    cut, of_parts = make_accumulated_step(loss, optimizer)(create_state(params, optimizer), {}, parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), cut.params, whole.params)
    added = to_floats(add_up(of_parts))
    for name, value in to_floats(metrics).items():
        np.testing.assert_allclose(added[name], value, rtol=1e-5, err_msg=name)


def test_one_row_is_never_cut() -> None:
    """Guards the limit: rows longer than max_tokens go alone, and a batch that fits goes whole."""
    batch = uneven_batch()
    assert [len(part["tokens_BT"]) for part in microbatches(batch, max_tokens=5)] == [1] * 6
    assert microbatches(batch, max_tokens=None) == [batch]
    assert microbatches(batch, max_tokens=72) == [batch]


def test_skipped_steps_are_counted() -> None:
    """Guards that a gradient which is not finite changes no weight and shows in the metrics."""
    optimizer = adamw(peak_lr=0.1, schedule=constant())
    state = create_state({"x": jnp.ones(1)}, optimizer)
    step = make_train_step(pull, optimizer)
    for target, skipped in ((0.0, 0), (np.nan, 1), (0.0, 1)):
        before = float(state.params["x"][0])
        state, metrics = step(state, {"weight": 1.0}, {"target": np.full(1, target, np.float32)})
        assert to_floats(metrics)["skipped_steps"] == skipped
        assert (float(state.params["x"][0]) == before) == (target != 0.0)
