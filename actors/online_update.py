"""The inner steps of one policy-update stage (4.3.3): several updates on one iteration's responses, near enough to theta_k.

The learner owns state, mesh and frozen trees; this takes a state and gives back the next. What is compiled depends on the
settings' constants alone. At the first inner step theta is theta_k: the pass that makes the gradient then also yields
log pi_k, and the `full` form of MDLOO's KL, whose gradient is zero there, is not computed. Later steps of that form need
the distributions of theta_k, so that one more copy of the trained parameters is held meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from actors.jobs import OnlineSettings
from actors.online_batch import OnlineBatch
from afm_rl.compute import Compute
from afm_rl.config import ModelConfig
from afm_rl.packing import Batch
from afm_rl.parameters import shard_like_params
from afm_rl.policy_losses import View, build
from afm_rl.sharding import shard_batch, to_host
from afm_rl.training import OF_UPDATE, TrainState, make_accumulated_step, make_train_step
from afm_rl.types import PolicyUpdate

#: The settings that an online objective is compiled with.
CONSTANTS = ("algorithm", "temperature", "beta", "gamma", "clip", "staleness_cap", "kl")


class OnlineUpdate:
    """The programs of a job's inner steps, for one choice of settings at a time."""

    def __init__(
        self,
        config: ModelConfig,
        optimizer: optax.GradientTransformation,
        *,
        compute: Compute,
        view: View,
        mesh: Any,
        seed: int,
    ) -> None:
        self._config, self._optimizer, self._mesh, self._seed = config, optimizer, mesh, seed
        self._how: dict[str, Any] = {"compute": compute}
        self._view = view
        self._settings: OnlineSettings | None = None

    def run(
        self, state: TrainState, frozen: Any, batch: OnlineBatch, settings: OnlineSettings
    ) -> tuple[TrainState, PolicyUpdate]:
        """The state after the inner steps on a scored batch, and the report. The state that comes in is donated.

        A step whose pass measures a KL to theta_k above `max_kl` makes no update, and is the last.
        """
        self._prepare_for(settings)
        if settings.kl == "full" and settings.inner_steps > 1:
            frozen = {**frozen, "behavior": _copied(state.params)}
        measured, of_update, done = [], {}, 0

        def near_enough(of_parts: Sequence[Any]) -> bool:
            return settings.max_kl is None or batch.kl(to_host(of_parts)) <= settings.max_kl

        for inner in range(settings.inner_steps):
            proceed = near_enough if inner and settings.max_kl is not None else None
            state, on_device = self._step(state, frozen, batch.parts_of(inner), proceed)
            measured = to_host(on_device)
            batch.learned(inner, measured)
            if OF_UPDATE[0] not in measured[0]:
                break
            done, of_update = done + 1, {name: float(measured[0][name]) for name in OF_UPDATE if name in measured[0]}
        return state, batch.report(measured, {**of_update, "inner_steps_done": float(done)})

    def _prepare_for(self, settings: OnlineSettings) -> None:
        if settings == self._settings:
            return
        options = {**self._how, **{name: getattr(settings, name) for name in CONSTANTS}}
        loss = build("online", self._config, options, view=self._view)
        self._whole = make_train_step(loss, self._optimizer, seed=self._seed)
        self._accumulated = make_accumulated_step(loss, self._optimizer, seed=self._seed)
        self._settings = settings

    def _step(
        self, state: TrainState, frozen: Any, parts: Sequence[Batch], proceed: Callable[[Sequence[Any]], bool] | None
    ) -> tuple[TrainState, list[dict[str, Any]]]:
        """One update by the sum of the microbatches' gradients; the metrics of each."""
        placed = [shard_batch(part, self._mesh) for part in parts]
        if len(placed) == 1 and proceed is None:
            state, metrics = self._whole(state, frozen, placed[0])
            return state, [metrics]
        return self._accumulated(state, frozen, placed, proceed)


@jax.jit
def _copied(params: Any) -> Any:
    """A copy that outlives the donation of the original, and lies where that does."""
    return shard_like_params(jax.tree.map(jnp.copy, params))
