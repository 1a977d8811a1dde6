"""afm-rl's side of `benchmarks/learner.py`: one process that trains, or measures a part of training, on request.

    python benchmarks/learner_worker.py '{"kind": "train", "shape": {...}, "dtype": "bfloat16", "batch": 16, "tokens": 128}'

Kinds: train (answers lines of standard input: a number of steps gives one JSON line), parts, peak, compile, size. Everything
runs through the product's own step, loss and optimizer.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import seconds_of

import afm_rl.model as model_module
from afm_rl.attention import causal_attention
from afm_rl.compute import Compute
from afm_rl.config import ModelConfig
from afm_rl.objectives.supervised import cross_entropy
from afm_rl.optimizer import adamw
from afm_rl.parameters import init_params
from afm_rl.policy_losses import supervised
from afm_rl.schedules import constant
from afm_rl.token_scores import score_tokens
from afm_rl.training import create_state, make_train_step


def optimizer() -> Any:
    """AdamW with the peer's rate and weight decay."""
    return adamw(peak_lr=1e-3, schedule=constant(), weight_decay=0.01, b2=0.999, eps=1e-8)


def make_batch(config: ModelConfig, batch: int, tokens: int) -> dict[str, jax.Array]:
    """Random tokens, every one but the first of a row a target."""
    ids_BT = np.random.default_rng(0).integers(4, config.vocab_size, (batch, tokens)).astype(np.int32)
    mask_BT = np.ones((batch, tokens), np.float32)
    mask_BT[:, 0] = 0
    return {"tokens_BT": jnp.asarray(ids_BT), "mask_BT": jnp.asarray(mask_BT)}


def build_step(config: ModelConfig, job: dict[str, Any]) -> Callable[[], float]:
    """One training step of the product, waited for; returns the loss."""
    rule = optimizer()
    step = make_train_step(supervised(config, compute=Compute(dtype=job["dtype"])), rule)
    state = [create_state(init_params(config, jax.random.key(0)), rule)]
    batch = make_batch(config, job["batch"], job["tokens"])

    def run() -> float:
        state[0], metrics = step(state[0], {}, batch)
        return float(metrics["loss"])

    return run


def train(config: ModelConfig, job: dict[str, Any]) -> None:
    """Serve steps: one JSON line with the seconds of each, for every number read."""
    step = build_step(config, job)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            before = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - before)
        answer({"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "loss": loss})


def peak(_: ModelConfig, job: dict[str, Any]) -> None:
    """The fastest matrix product of this machine in `dtype` with a float32 result: GFLOP/s, best of some shapes."""
    best = 0.0
    for rows, inner, columns in ((2048, 512, 1536), (2048, 1536, 512), (2048, 2048, 2048)):
        a = jax.random.normal(jax.random.key(0), (rows, inner)).astype(job["dtype"])
        b = jax.random.normal(jax.random.key(1), (columns, inner)).astype(job["dtype"])
        product = jax.jit(
            lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        )
        seconds = seconds_of(lambda a=a, b=b, product=product: product(a, b), reps=25)
        best = max(best, 2e-9 * rows * inner * columns / seconds)
    answer({"gflops": best})


def attention_seconds(config: ModelConfig, job: dict[str, Any], *, reps: int) -> float:
    """Forward and backward of attention (scores, softmax, mixing; no projections) over all layers."""
    shape = (job["batch"], job["tokens"])
    q = jax.random.normal(jax.random.key(0), (*shape, config.num_heads, config.head_dim)).astype(job["dtype"])
    k = q[:, :, : config.num_kv_heads]

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, pull = jax.vjp(causal_attention, q, k, v)
        return pull(out)

    return config.num_layers * seconds_of(lambda: both(q, k, 0.5 * k), reps=reps)


def parts(config: ModelConfig, job: dict[str, Any]) -> None:
    """Milliseconds of the parts of a step: each is a program of its own, so they need not add up to the whole."""
    params, batch = init_params(config, jax.random.key(0)), make_batch(config, job["batch"], job["tokens"])
    loss_fn, key = supervised(config, compute=Compute(dtype=job["dtype"])), jax.random.key(0)
    hidden = jnp.ones((job["batch"], job["tokens"], config.dim), job["dtype"])

    def head(params: Any, hidden: jax.Array) -> jax.Array:
        scores = score_tokens(params, hidden, [batch["tokens_BT"]], config=config)[0]
        return cross_entropy(scores, batch["mask_BT"])[0]

    forward = jax.jit(lambda p: loss_fn(p, {}, batch, key)[0])
    gradient = jax.jit(jax.grad(lambda p: loss_fn(p, {}, batch, key)[0]))
    head_gradient = jax.jit(jax.grad(head, (0, 1)))
    run = build_step(config, job)
    seconds = {
        "step": seconds_of(run, reps=5),
        "forward": seconds_of(lambda: forward(params), reps=5),
        "forward and backward": seconds_of(lambda: gradient(params), reps=5),
        "logits and loss (forward and backward)": seconds_of(
            lambda: head_gradient({"embed": params["embed"]}, hidden), reps=5
        ),
        "attention without projections (forward and backward)": attention_seconds(config, job, reps=5),
    }
    seconds["backward (difference)"] = seconds["forward and backward"] - seconds["forward"]
    seconds["optimizer (difference)"] = seconds["step"] - seconds["forward and backward"]
    answer({name: 1e3 * value for name, value in seconds.items()})


def compile_time(config: ModelConfig, job: dict[str, Any]) -> None:
    """Seconds to trace and compile the training step; `max_unrolled` replaces the product's limit if given."""
    if job["max_unrolled"] is not None:
        model_module.MAX_UNROLLED_LAYERS = job["max_unrolled"]
    rule = optimizer()
    step = make_train_step(supervised(config, compute=Compute(dtype=job["dtype"])), rule)
    state = create_state(init_params(config, jax.random.key(0)), rule)
    before = time.perf_counter()
    step.lower(state, {}, make_batch(config, job["batch"], job["tokens"])).compile()  # type: ignore[attr-defined]
    answer({"seconds": time.perf_counter() - before})


def size(config: ModelConfig, job: dict[str, Any]) -> None:
    """Microseconds per token of a step, and attention's share of it."""
    whole = seconds_of(build_step(config, job), reps=3)
    attention = attention_seconds(config, job, reps=3)
    answer({"us_per_token": 1e6 * whole / (job["batch"] * job["tokens"]), "attention": attention / whole})


def answer(fields: dict[str, Any]) -> None:
    """One line that the benchmark reads; whatever else is printed is not for it."""
    print("RESULT " + json.dumps(fields), flush=True)


def main() -> None:
    """Run the kind of measurement that the first argument describes."""
    job = json.loads(sys.argv[1])
    kinds = {"train": train, "peak": peak, "parts": parts, "compile": compile_time, "size": size}
    kinds[job["kind"]](ModelConfig(**job["shape"]), job)


if __name__ == "__main__":
    main()
