"""Training state and step, for any objective: pre-training, SFT, rewards, preferences, MDLOO and adapters all come here.

An objective is a function `loss(params, frozen, batch, key) -> (scalar, metrics)`; the optimizer is an optax chain. Master
weights and optimizer state are float32. What is trained may be part of a larger tree (LoRA adapters, FFN mask scores):
`frozen` is handed to the loss beside the trained parameters and receives no gradient. Under a mesh, weights, gradients and
optimizer state lie as the parameters are declared (`afm_rl/parameters.py`).
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

from afm_rl.optimizer import SkipState, skipped_steps
from afm_rl.parameters import shard_like_params

Batch = Mapping[str, Any]
LossFn = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

#: A batch's entry that says which share of a larger batch's loss its own loss is (`packing.microbatches`).
SHARE = "share"
#: Metrics of the update, as against those of the batch.
OF_UPDATE = ("grad_norm", "skipped_steps")


class TrainState(struct.PyTreeNode):
    """Everything a checkpoint holds for the optimizer: step count, trained parameters, optimizer state."""

    step: jax.Array
    params: Any
    opt_state: Any


def create_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0 over a copy of `params` (the step donates it)."""

    def create(params: Any) -> TrainState:
        return shard_like_params(TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(params)))

    # Under jit: op by op, every leaf's zeros would be a program of their own to compile.
    return jax.jit(create)(params)


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, seed: int = 0
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `(state, frozen, batch) -> (state, metrics)`; the state is donated.

    The random key of a step is fold_in(seed, step): a resumed run draws the same dropout as an uninterrupted one.
    """

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics = gradient(loss_fn, state.params, frozen, batch, key)
        state, of_update = _update(optimizer, state, grads)
        return state, {**of_update, **metrics}

    return jax.jit(step, donate_argnums=0)


def make_accumulated_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, seed: int = 0
) -> Callable[..., tuple[TrainState, list[dict[str, jax.Array]]]]:
    """A `(state, frozen, microbatches) -> (state, metrics of each)`: one update by the sum of the microbatches' gradients.

    Each microbatch's loss is normalised by the whole batch: by the loss itself, or by its `SHARE`. Memory is that of the
    largest microbatch; each of their shapes is compiled once. The state is donated. With `proceed`, a function of the
    microbatches' metrics, the update is made only where it returns True; else the state comes back as it is.
    """

    def add_to(total: Any, params: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        grads, metrics = gradient(loss_fn, params, frozen, batch, key)
        return jax.tree.map(jnp.add, total, grads), metrics

    zeros = jax.jit(lambda params: shard_like_params(jax.tree.map(jnp.zeros_like, params)))
    add_gradient = jax.jit(add_to, donate_argnums=0)
    update = jax.jit(partial(_update, optimizer), donate_argnums=0)
    key_of = jax.jit(lambda step, index: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), index))

    def step(
        state: TrainState,
        frozen: Any,
        microbatches: Sequence[Batch],
        proceed: Callable[[list[dict[str, jax.Array]]], bool] | None = None,
    ) -> tuple[TrainState, list[dict[str, jax.Array]]]:
        total, measured = zeros(state.params), []
        for index, batch in enumerate(microbatches):
            total, metrics = add_gradient(total, state.params, frozen, batch, key_of(state.step, index))
            measured.append(metrics)
        if proceed is not None and not proceed(measured):
            return state, measured
        state, of_update = update(state, total)
        return state, [{**of_update, **metrics} for metrics in measured]

    return step


def gradient(loss_fn: LossFn, params: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    """(gradient, metrics with the loss) of a batch, or of a share of a larger one: over all shares both add up.

    Integer metrics are counts, which add up as they are.
    """
    share = batch.get(SHARE)
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, frozen, batch, key)
    metrics = {"loss": loss, **metrics}
    if share is not None:
        grads = jax.tree.map(lambda g: g * share, grads)
        metrics = {k: v * share if jnp.issubdtype(v.dtype, jnp.floating) else v for k, v in metrics.items()}
    return shard_like_params(grads), metrics


def add_up(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The batch's metrics from those of its shares; what belongs to the update is in each of them already."""
    return {name: value if name in OF_UPDATE else sum(m[name] for m in measured) for name, value in measured[0].items()}


def _update(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one update; the gradient's global norm, and how many steps our optimizers have skipped so far."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    state = shard_like_params(TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state))
    skipped = {"skipped_steps": skipped_steps(opt_state)} if isinstance(opt_state, SkipState) else {}
    return state, {"grad_norm": optax.global_norm(grads), **skipped}


def to_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics on the host. Waits for the step that made them."""
    return {name: float(np.asarray(value)) for name, value in metrics.items()}
