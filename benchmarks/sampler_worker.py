"""afm-rl's side of `benchmarks/sampler.py`: one process that generates from a Hugging Face folder, on request.

    python benchmarks/sampler_worker.py '{"model": FOLDER, "dtype": "bfloat16", "max_batch": 64, "deterministic": false}'

Everything runs through the product's facade, `afm_rl.generate.Generator`. Beside the requests that every side answers
(`peers/workload.py`) it compares a request alone with the same one in company, and measures this machine's limits.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peers.workload import Workload, make_prompts, serve
from timing import seconds_of

from afm_rl.compute import Compute
from afm_rl.config import ModelConfig
from afm_rl.generate import Generator
from afm_rl.generation.options import EngineOptions
from afm_rl.huggingface import load_params
from afm_rl.model import forward, logits
from afm_rl.types import GenerationRequest, Group, SamplingOptions

#: Enough for every workload: nothing has to give up its pages.
KV_CACHE_BYTES = 2**30
#: Bytes of the array whose reading measures the memory: far beyond any cache.
READ_BYTES = 2**29


def build(config: ModelConfig, job: dict[str, Any]) -> Generator:
    """The engine under test; no end token."""
    options = EngineOptions(
        max_batch=job["max_batch"],
        compute_dtype=job["dtype"],
        deterministic=job["deterministic"],
        kv_cache_bytes=KV_CACHE_BYTES,
    )
    return Generator(config, stop_ids=(), options=options)


def requests_of(workload: Workload, config: ModelConfig) -> list[GenerationRequest]:
    """One request a prompt; request i of seed s draws from a stream of its own."""
    new, options = workload["new_tokens"], SamplingOptions(ignore_stop=True)
    lengths = new if isinstance(new, list) else [new] * workload["prompts"]
    return [
        GenerationRequest(
            id=str(i),
            prompt_T=prompt_T,
            num_responses=workload["responses"],
            max_tokens=length,
            seed=1000 * workload["seed"] + i,
            options=options,
        )
        for i, (prompt_T, length) in enumerate(zip(make_prompts(workload, config.vocab_size), lengths, strict=True))
    ]


def generate(generator: Generator, workload: Workload) -> dict[str, Any]:
    """Run a workload; the engine's own counts of what it prefilled and sampled."""
    before = counts(generator)
    groups = generator.generate(requests_of(workload, generator.config))
    made = {name: count - before[name] for name, count in counts(generator).items()}
    if made["response_tokens"] != sum(len(tokens) for group in groups for tokens in group.responses):
        raise RuntimeError(f"the engine counts {made['response_tokens']} response tokens, its answers hold others")
    return made


def counts(generator: Generator) -> dict[str, int]:
    """The counters that the benchmark reports."""
    return {"prompt_tokens": generator.stats.prompt_tokens, "response_tokens": generator.stats.response_tokens}


def alone(generator: Generator, workload: Workload) -> dict[str, Any]:
    """The first `compared` requests alone, against the same in company: how many tokens differ.

    A response that took another token goes on differently, so the places where responses part are counted too, over the
    tokens that were sampled from the same context.
    """
    requests = requests_of(workload, generator.config)
    together = generator.generate(requests)
    total = differing = parted = same_context = 0
    for request, group in zip(requests[: workload["compared"]], together, strict=False):
        ours: Group = generator.generate([request])[0]
        for a_T, b_T in zip(ours.responses, group.responses, strict=True):
            unequal = np.flatnonzero(a_T != b_T)
            total, differing, parted = total + len(a_T), differing + len(unequal), parted + bool(len(unequal))
            same_context += int(unequal[0]) + 1 if len(unequal) else len(a_T)
    return {"tokens": total, "differing": differing, "parted": parted, "same_context": same_context}


def machine(rows: int) -> dict[str, Any]:
    """GFLOP/s of the fastest product of `rows` rows in each dtype (float32 result), and GB/s of reading a large array."""
    product = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32))
    gflops = {}
    for dtype in ("float32", "bfloat16"):
        best = 0.0
        for inner, outer in ((512, 1536), (1536, 512), (512, 8192), (1024, 1024), (2048, 2048)):
            x = jax.random.normal(jax.random.key(0), (rows, inner)).astype(dtype)
            w = jax.random.normal(jax.random.key(1), (outer, inner)).astype(dtype)
            seconds = seconds_of(lambda x=x, w=w: product(x, w), reps=50)
            best = max(best, 2e-9 * rows * inner * outer / seconds)
        gflops[dtype] = best
    values = jnp.ones(READ_BYTES // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return {"gflops": gflops, "read_gb_s": 1e-9 * READ_BYTES / seconds_of(lambda: total(values), reps=5)}


def main() -> None:
    """Load the model once, then answer requests."""
    job = json.loads(sys.argv[1])
    config, params = load_params(job["model"])
    generator = build(config, job)
    generator.load(params, policy="benchmark", version=0)
    compute = Compute(dtype=job["dtype"])

    def score(ids: Sequence[int]) -> np.ndarray:
        hidden_BTD = forward(params, jnp.asarray([ids], jnp.int32), config=config, compute=compute)
        return np.asarray(logits(params, hidden_BTD[:, -1], config)[0])

    serve(
        lambda workload: generate(generator, workload),
        score,
        alone=lambda workload: alone(generator, workload),
        machine=machine,
    )


if __name__ == "__main__":
    main()
