"""The training step on problems with known answers: what moves, what does not, and which random key it draws from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afm_rl.training import Batch, TrainState, create_state, make_train_step, to_floats


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
