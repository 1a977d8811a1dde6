"""Training state and step, for any objective: pre-training, SFT, rewards, preferences, MDLOO and adapters all come here.

An objective is a function `loss(params, batch, key) -> (scalar, metrics)`; the optimizer is an optax chain. Master weights
and optimizer state are float32. What is trained may be part of a larger tree (LoRA adapters, FFN mask scores): `frozen` is
handed to the loss beside the trained parameters and receives no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

Batch = Mapping[str, Any]
LossFn = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class TrainState(struct.PyTreeNode):
    """Everything a checkpoint holds for the optimizer: step count, trained parameters, optimizer state."""

    step: jax.Array
    params: Any
    opt_state: Any


def create_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0 over a copy of `params` (the step donates it)."""
    # Under jit: op by op, every leaf's zeros would be a program of their own to compile.
    opt_state = jax.jit(optimizer.init)(params)
    params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    return TrainState(jnp.int32(0), params, opt_state)


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, seed: int = 0
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `(state, frozen, batch) -> (state, metrics)`; the state is donated.

    The random key of a step is fold_in(seed, step): a resumed run draws the same dropout as an uninterrupted one.
    """

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, frozen, batch, key)
        state, grad_norm = _update(optimizer, state, grads)
        return state, {"loss": loss, "grad_norm": grad_norm, **metrics}

    return jax.jit(step, donate_argnums=0)


def make_accumulated_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, seed: int = 0
) -> Callable[[TrainState, Any, Sequence[Batch]], tuple[TrainState, list[dict[str, jax.Array]]]]:
    """A `(state, frozen, microbatches) -> (state, metrics of each)`: one update by the sum of the microbatches' gradients.

    The loss has to be normalised by the whole batch. Memory is that of the largest microbatch; each of their shapes is
    compiled once. The state is donated.
    """

    def gradient(total: Any, params: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, frozen, batch, key)
        return jax.tree.map(jnp.add, total, grads), {"loss": loss, **metrics}

    add_gradient = jax.jit(gradient, donate_argnums=0)
    update = jax.jit(partial(_update, optimizer), donate_argnums=0)

    def step(state: TrainState, frozen: Any, microbatches: Sequence[Batch]) -> tuple[TrainState, list[dict[str, jax.Array]]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        total = jax.tree.map(jnp.zeros_like, state.params)
        measured = []
        for index, batch in enumerate(microbatches):
            total, metrics = add_gradient(total, state.params, frozen, batch, jax.random.fold_in(key, index))
            measured.append(metrics)
        state, grad_norm = update(state, total)
        return state, [{"grad_norm": grad_norm, **metrics} for metrics in measured]

    return step


def _update(optimizer: optax.GradientTransformation, state: TrainState, grads: Any) -> tuple[TrainState, jax.Array]:
    """The state after one update, and the gradient's global norm."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), optax.global_norm(grads)


def to_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics on the host. Waits for the step that made them."""
    return {name: float(np.asarray(value)) for name, value in metrics.items()}
