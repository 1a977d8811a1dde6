"""The learner: a shell over `afm_rl/training.py` that trains any objective, job after job, and checkpoints as it goes.

A `TrainingJob` says what to train, from which policy folder, against which frozen ones, with which optimizer. `begin`
restores the job's newest whole checkpoint, so that a restarted learner continues where the last commit was; batches are a
function of the step alone (see `afm_rl/packing.py`), which makes the continuation exact. The online update (4.3.3) is here
too (`online_update.py`), because log pi_theta, pi_k and pi_ref must come from the learner's own program.

One learner may be one process of several that form a mesh: every process is told the same, all of them compute, and what a
call returns or writes is the first process's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from actors.artifacts import load_artifact, save_artifact
from actors.jobs import AdapterSpec, HeldOut, LearnerSetup, OnlineSettings, TrainingJob
from actors.online_batch import OnlineBatch
from actors.online_update import OnlineUpdate
from afm_rl import checkpoint
from afm_rl.compute import Compute
from afm_rl.config import ModelConfig
from afm_rl.flops import peak_flops_per_s, train_flops_per_token
from afm_rl.goodput import Goodput
from afm_rl.huggingface import load_pretrained
from afm_rl.lora import init_lora
from afm_rl.objectives.supervised import cross_entropy
from afm_rl.packing import Batch, PackedRows, microbatches
from afm_rl.parameters import axes_like_params, init_params, param_shardings, shard_like_params
from afm_rl.policy_losses import View, adapter_view, build, full_view, response_logps, target_scores
from afm_rl.reward_model import init_heads
from afm_rl.sharding import make_mesh, put, shard_batch, to_host
from afm_rl.training import SHARE, TrainState, add_up, create_state, make_accumulated_step, make_train_step, to_floats
from afm_rl.types import PolicyUpdate, ScoredGroup, Weights
from afm_rl.weights import flatten
from pretrain.pruning import init_scores, mask_view, prune
from quant.sensitivity import fisher_diagonal

#: Objectives whose loss is a mean over pairs of responses; the others' is one over target tokens.
_OVER_PAIRS = frozenset({"reward", "dpo", "ipo"})

Method = TypeVar("Method", bound=Callable[..., Any])


def on_mesh(method: Method) -> Method:
    """A method that runs under the learner's mesh, where it has one."""

    @wraps(method)
    def run(self: Learner, *args: Any, **kwargs: Any) -> Any:
        with self._mesh_set():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


class Learner:
    """One process of the learner group. Construct once, then `begin` a job, `train` it, `export` what came out."""

    def __init__(self, setup: LearnerSetup | None = None) -> None:
        self._setup = setup or LearnerSetup()
        # One device needs no mesh: programs are then compiled as they are written.
        self._mesh = make_mesh(self._setup.mesh) if self._setup.mesh.size > 1 else None
        self._goodput, self._idle_since = Goodput(), time.perf_counter()
        self._job: TrainingJob | None = None
        self._memory: dict[str, Any] = {}  # what an online job keeps beside its state, written into every checkpoint
        self._resumed_from: Mapping[str, Any] = {}
        self._state: TrainState | None = None
        self._frozen: dict[str, Any] = {}
        self._view: View = full_view
        self._checkpoints: checkpoint.Checkpoints | None = None
        self.config: ModelConfig | None = None

    def _mesh_set(self) -> AbstractContextManager[Any]:
        return jax.set_mesh(self._mesh) if self._mesh is not None else nullcontext()

    @on_mesh
    def begin(self, job: TrainingJob) -> int:
        """Set the job up, from its newest checkpoint where one exists; returns the step (or iteration) to go on from."""
        if job == self._job and int(self._require_state().step) == 0:
            return self._restore()  # begun already, for its reference's log-probabilities
        self._job, self._state, self._frozen = None, None, {}  # two jobs at a time would not fit
        loaded = load_artifact(job.init, load_policy=self._load_policy) if job.init else None
        config = job.config or (loaded.config if loaded else None)
        if config is None:
            raise ValueError(f"training job {job.task!r} has neither a policy to start from nor a model configuration")
        if loaded and loaded.config and config.replace(rope_base=0.0) != loaded.config.replace(rope_base=0.0):
            raise ValueError(f"training job {job.task!r}: {job.init} has another shape than the job's configuration")
        frozen = {role: load_artifact(at, load_policy=self._load_policy) for role, at in job.frozen.items()}
        self._frozen = {role: self._place(artifact.params) for role, artifact in frozen.items()}
        options: dict[str, Any] = {"compute": self._setup.compute, **job.options}
        if "teacher" in frozen:
            options["teacher_config"] = frozen["teacher"].config
        params = loaded.params if loaded else _init_params(config, np.uint32(job.seed))
        trained = self._place(self._trained(job, params, config))
        optimizer = job.optimizer.build(width=config.dim)
        if job.objective == "online":  # the constants of its loss come with every update
            self._online = OnlineUpdate(
                config, optimizer, compute=self._setup.compute, view=self._view, mesh=self._mesh, seed=job.seed
            )
        else:
            self._loss = build(job.objective, config, options, view=self._view)
            self._step = make_train_step(self._loss, optimizer, seed=job.seed)
            self._accumulated_step = make_accumulated_step(self._loss, optimizer, seed=job.seed)
        self._job, self.config = job, config
        how: dict[str, Any] = {"config": config, "compute": self._setup.compute}
        self._logps = jax.jit(partial(_log_probs, **how), static_argnames=("view", "temperature"))
        self._scores = jax.jit(partial(_scores, **how), static_argnames="view")
        self._state = create_state(trained, optimizer)
        self._goodput, self._idle_since = Goodput(), time.perf_counter()
        return self._restore()

    def _load_policy(self, folder: Path) -> tuple[ModelConfig, Any]:
        """Streamed into the mesh's shards, never whole on the host."""
        mesh = self._mesh
        model = load_pretrained(folder, shardings=None if mesh is None else lambda of: param_shardings(of, mesh))
        return model.config, model.params

    def _place(self, tree: Any) -> Any:
        """Arrays that every process has, laid out on the mesh like the parameters they belong to."""
        mesh = self._mesh
        if mesh is None:
            return jax.tree.map(jnp.asarray, tree)

        def place(path: Any, leaf: Any) -> jax.Array:
            return leaf if _is_placed(leaf) else put(np.asarray(leaf), axes_like_params(path, leaf.ndim), mesh)

        return jax.tree_util.tree_map_with_path(place, tree)

    def _trained(self, job: TrainingJob, params: Any, config: ModelConfig) -> Any:
        """What the job trains, out of the parameters it starts from; sets the view that the model sees them through."""
        key, self._view = jax.random.key(job.seed), full_view
        if job.part == "reward":
            return params if "heads" in params else {"trunk": params, "heads": init_heads(config, key)}
        if job.part == "masks":
            self._view = mask_view(k=_required(job.keep_units, job, "how many units to keep"))
            return {"model": params, "scores": init_scores(config)}
        if job.part == "adapter":
            adapter = _required(job.adapter, job, "the adapter's rank")
            self._frozen["base"] = self._place(params)
            self._view = adapter_view(alpha=adapter.alpha, rank=adapter.rank)
            return _start_adapter(adapter, config, key)
        return params

    @on_mesh
    def train(self, batches: Sequence[Batch]) -> list[dict[str, float]]:
        """One optimizer step per batch, a checkpoint where one is due; metrics of every step."""
        job, metrics, start = self._require_job(), [], int(self._require_state().step)
        stepped_s = self._goodput.seconds["step"]
        self._woken()
        for done, batch in enumerate(batches, start=start + 1):
            due = done % job.checkpoint_every == 0
            with self._goodput.measure("step"):
                metrics.append(self._train_step(batch))
                if due:  # a step runs on while we go on; its seconds must not count as the checkpoint's
                    jax.block_until_ready(self._require_state())
            if due:
                with self._goodput.measure("checkpoint"):
                    self.save(done)
        with self._goodput.measure("step"):
            measured = [to_floats(m) for m in metrics]
        self._idle_since = time.perf_counter()
        speed = self._speed(batches, self._goodput.seconds["step"] - stepped_s)
        return [{**of_step, **speed} for of_step in measured]

    def _woken(self) -> None:
        """The learner has work again: it waited for data until now."""
        self._goodput.add("data_wait", time.perf_counter() - self._idle_since)

    def _speed(self, batches: Sequence[Batch], step_s: float) -> dict[str, float]:
        """Positions a second, padding included, and MFU on devices whose peak is published."""
        assert self.config is not None
        tokens = sum(batch["tokens_BT"].size for batch in batches)
        speed = {"tokens_per_s": tokens / max(step_s, 1e-9)}
        devices = self._mesh.devices.ravel() if self._mesh is not None else jax.devices()[:1]
        peak = peak_flops_per_s(devices[0])
        if peak is not None:
            flops = train_flops_per_token(self.config, batches[0]["tokens_BT"].shape[1])
            speed["mfu"] = flops * speed["tokens_per_s"] / (peak * len(devices))
        return speed

    def _train_step(self, batch: Batch) -> dict[str, Any]:
        """One update, by the whole batch at once or by the sum of its microbatches' gradients."""
        pairs = self._require_job().objective in _OVER_PAIRS
        parts = microbatches(batch, max_tokens=self._setup.microbatch_tokens, pairs=pairs)
        if len(parts) == 1:
            self._state, metrics = self._step(self._require_state(), self._frozen, shard_batch(batch, self._mesh))
            return metrics
        placed = [shard_batch(part, self._mesh) for part in parts]
        self._state, measured = self._accumulated_step(self._require_state(), self._frozen, placed)
        return add_up(measured)

    def goodput(self) -> dict[str, float]:
        """Where the job's time went, in seconds by kind, and the share of steps (`afm_rl/goodput.py`)."""
        return self._goodput.summary()

    @on_mesh
    def log_probs(self, batch: Batch, which: str = "current", temperature: float = 1.0) -> np.ndarray:
        """log p of the targets [B, T] under the trained parameters ("current") or a frozen tree (its role)."""
        frozen, view = self._frozen, self._view
        params = self._require_state().params if which == "current" else frozen[which]
        view = view if which == "current" else full_view
        return to_host(self._logps(params, frozen, shard_batch(batch, self._mesh), view=view, temperature=temperature))

    @on_mesh
    def held_out(self, rows: Mapping[str, PackedRows]) -> dict[str, HeldOut]:
        """Loss and top-1 accuracy on each set of packed rows, under the current parameters."""
        params = self._require_state().params
        measured = {}
        for name, packed in rows.items():
            loss = accuracy = 0.0
            parts = microbatches(packed.take(np.arange(len(packed))), max_tokens=self._setup.microbatch_tokens)
            for part in parts:
                metrics = self._scores(params, self._frozen, shard_batch(part, self._mesh), view=self._view)
                share = float(part.get(SHARE, 1.0))
                loss, accuracy = loss + share * float(metrics["nll"]), accuracy + share * float(metrics["accuracy"])
            measured[name] = HeldOut(loss=loss, accuracy=accuracy)
        return measured

    @on_mesh
    def fisher(self, batches: Sequence[Batch]) -> dict[str, np.ndarray]:
        """Mean squared gradient of the job's loss per operation (`quant/sensitivity.py`), over the batches."""
        job = self._require_job()
        params, seed = self._require_state().params, job.seed

        def loss(params: Any, frozen: Any, batch: Batch) -> Any:
            return self._loss(params, frozen, batch, jax.random.key(seed))

        gradient = jax.jit(lambda *inputs: shard_like_params(jax.grad(loss, has_aux=True)(*inputs)[0]))
        return fisher_diagonal(to_host(gradient(params, self._frozen, shard_batch(b, self._mesh))) for b in batches)

    @on_mesh
    def update_policy(
        self,
        iteration: int,
        groups: Sequence[ScoredGroup],
        settings: OnlineSettings,
        consumed: Mapping[str, Any] | None = None,
        version: int | None = None,
    ) -> PolicyUpdate:
        """One policy-update stage over n x K responses, in microbatches; a checkpoint of `iteration` + 1 where one is due.

        `version` is that of the parameters as they are, theta_k (None: `iteration`): responses of another version are
        weighted by their staleness. `consumed` is written into the metadata of the next checkpoint. Where no response can
        be used nothing is updated and the metric `sequences` is 0; the iteration counts all the same.
        """
        self._woken()
        if consumed is not None:
            self._memory["consumed"] = dict(consumed)
        with self._goodput.measure("step"):
            batch = OnlineBatch(
                groups,
                settings,
                version=iteration if version is None else version,
                average=self._memory.get("average_reward"),
                whole_rows=self._setup.mesh.seq > 1,  # a sequence that is cut over the mesh stays cut
                share_prompts=self._setup.mesh.size == 1,
            )
            if batch.score(self.log_probs):
                self._state, report = self._online.run(self._require_state(), self._frozen, batch, settings)
            else:
                report = batch.report([], {"inner_steps_done": 0.0})
            if batch.average is not None:
                self._memory["average_reward"] = batch.average
        if (iteration + 1) % self._require_job().checkpoint_every == 0:
            with self._goodput.measure("checkpoint"):
                self.save(iteration + 1)
        self._idle_since = time.perf_counter()
        return report

    def save(self, step: int) -> None:
        """Begin to write a checkpoint of the job at `step` (online: iterations done); the write goes on behind."""
        job = self._require_job()
        assert self._checkpoints is not None  # opened by begin
        self._checkpoints.save(step, self._require_state(), {"task": job.task, "step": step, **self._memory})

    def resumed_from(self) -> Mapping[str, Any]:
        """The metadata of the checkpoint that `begin` restored, `consumed` among it; {} where there was none."""
        return self._resumed_from

    def wait_for_checkpoints(self) -> None:
        """Block until what `save` began is on the disk; raises what went wrong with it."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    @on_mesh
    def publish(self, policy: str, version: int) -> Weights | None:
        """The trained parameters as flat buffers, for the weight store; None from all processes but the first."""
        params = to_host(self._require_state().params)
        return flatten(params, policy=policy, version=version) if jax.process_index() == 0 else None

    @on_mesh
    def export(self, folder: str, tokenizer_folder: str | None = None) -> None:
        """Write what was trained as a policy folder, a reward model or an adapter."""
        job, params, config = self._require_job(), to_host(self._require_state().params), self.config
        assert config is not None
        self.wait_for_checkpoints()  # whoever has the exported folder may delete the checkpoints
        if job.part == "masks":
            k = _required(job.keep_units, job, "how many units to keep")
            params, config = prune(params["model"], params["scores"], k=k), config.replace(ffn_dim=k)
        if jax.process_index() == 0:
            save_artifact(Path(folder), params, config, adapter=job.adapter, tokenizer_folder=tokenizer_folder)
        if jax.process_count() > 1:  # the others may read the folder next
            multihost_utils.sync_global_devices(f"export of {job.task}")

    def _restore(self) -> int:
        job = self._require_job()
        if self._checkpoints is not None:
            self._checkpoints.close()
        self._checkpoints = checkpoint.Checkpoints(
            job.checkpoint_folder, keep=self._setup.keep, keep_every=self._setup.keep_every
        )
        self._memory, self._resumed_from = {}, {}
        found = self._checkpoints.latest()
        if found is None:
            return 0
        if found.metadata["task"] != job.task:
            raise ValueError(f"{found.folder}: a checkpoint of task {found.metadata['task']!r}, not {job.task!r}")
        self._state = checkpoint.restore(found, like=self._require_state())
        self._resumed_from = dict(found.metadata)
        self._memory = {name: found.metadata[name] for name in ("consumed", "average_reward") if name in found.metadata}
        return int(found.metadata["step"])

    def _require_job(self) -> TrainingJob:
        if self._job is None:
            raise RuntimeError("the learner has no job: call begin() first")
        return self._job

    def _require_state(self) -> TrainState:
        if self._state is None:
            raise RuntimeError("the learner has no state: call begin() first")
        return self._state


def _is_placed(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


@partial(jax.jit, static_argnums=0)
def _init_params(config: ModelConfig, seed: np.uint32) -> Any:
    return init_params(config, jax.random.key(seed))


def _log_probs(
    params: Any, frozen: Any, batch: Batch, *, view: View, temperature: float, config: ModelConfig, compute: Compute
) -> jax.Array:
    return response_logps(view(params, frozen, batch), batch, config=config, compute=compute, temperature=temperature)


def _scores(
    params: Any, frozen: Any, batch: Batch, *, view: View, config: ModelConfig, compute: Compute
) -> dict[str, jax.Array]:
    scores = target_scores(view(params, frozen, batch), batch, config=config, compute=compute)
    return cross_entropy(scores, jnp.asarray(batch["mask_BT"]))[1]


def _required(value: Any, job: TrainingJob, what: str) -> Any:
    if value is None:
        raise ValueError(f"training job {job.task!r} trains {job.part} but does not say {what}")
    return value


def _start_adapter(spec: AdapterSpec, config: ModelConfig, key: jax.Array) -> Any:
    if spec.init is None:
        return init_lora(config, spec.rank, key)
    found = load_artifact(spec.init)
    if found.adapter is None or found.adapter.rank != spec.rank:
        raise ValueError(f"{spec.init}: not an adapter of rank {spec.rank}")
    return found.params
