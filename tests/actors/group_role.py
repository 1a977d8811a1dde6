"""The role of the group tests: a sharded state whose every step needs every device, checkpointed every few steps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from afm_rl.errors import UserError

SIZE = 16
CHECKPOINT_EVERY = 3


def start() -> np.ndarray:
    return np.linspace(-1.0, 1.0, SIZE, dtype=np.float32)


def step_in_numpy(state_D: np.ndarray, step: int) -> np.ndarray:
    """x + 0.1 * sum(sin(x + step)) - 0.01 x, in float64."""
    return state_D + 0.1 * np.sin(state_D + step).sum() - 0.01 * state_D


class Sharded:
    """Steps over a state sharded over all devices of the group; the checkpoint holds the steps that were applied."""

    def __init__(self, *, folder: str) -> None:
        self._folder = Path(folder)
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        self._sharding = NamedSharding(mesh, PartitionSpec("data"))

        def local(x_D: jax.Array, step: jax.Array) -> jax.Array:
            return x_D + 0.1 * jax.lax.psum(jnp.sin(x_D + step).sum(), "data") - 0.01 * x_D

        specs = (PartitionSpec("data"), PartitionSpec())
        self._step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data")))

    def begin(self) -> int:
        """Restore the newest checkpoint; the step to go on from."""
        newest = max(self._folder.glob("step-*.npy"), default=None)
        state_D = start() if newest is None else np.load(newest)
        self._state_D = jax.make_array_from_callback((SIZE,), self._sharding, lambda index: state_D[index])
        self._done = 0 if newest is None else int(newest.stem.split("-")[1])
        return self._done

    def train(self, count: int, pause_s: float = 0.0) -> int:
        """Apply `count` steps; each takes at least `pause_s`."""
        for _ in range(count):
            time.sleep(pause_s)
            self._state_D = self._step(self._state_D, jnp.float32(self._done))
            self._state_D.block_until_ready()
            self._done += 1
            if self._done % CHECKPOINT_EVERY == 0:
                self._save()
        return self._done

    def _save(self) -> None:
        state_D = self.state()
        if jax.process_index() == 0:
            unfinished = self._folder / f".{self._done}.npy"
            np.save(unfinished, state_D)
            unfinished.rename(self._folder / f"step-{self._done:04d}.npy")
        multihost_utils.sync_global_devices(f"saved {self._done}")

    def state(self) -> np.ndarray:
        return np.asarray(multihost_utils.process_allgather(self._state_D, tiled=True))

    def devices(self) -> dict[str, Any]:
        return {"all": jax.device_count(), "mine": jax.local_device_count(), "processes": jax.process_count()}

    def add_up(self, *parts: np.ndarray, times: int = 1) -> float:
        return float(sum(part.sum() for part in parts) * times)

    def compute(self, seconds: float) -> float:
        """Busy in compiled code and in Python for so long."""
        start_s, product = time.monotonic(), jnp.ones((600, 600)) / 600
        while time.monotonic() - start_s < seconds:
            product = jnp.tanh(product @ product).block_until_ready()
            sum(range(100_000))
        return time.monotonic() - start_s

    def fail(self, ranks: list[int] | None = None) -> None:
        """Raise on these ranks (all); the others wait for them in a collective."""
        if ranks is None or jax.process_index() in ranks:
            raise UserError("the corpus has no documents")
        multihost_utils.sync_global_devices("everyone")
