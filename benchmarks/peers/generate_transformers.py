"""transformers' side of `benchmarks/sampler.py`: `generate` on Qwen3 in PyTorch, in an environment of its own.

    /path/to/torch/python benchmarks/peers/generate_transformers.py '{"model": FOLDER, "cache": "static", ...}'

Caches: dynamic, static, compiled (static, the decoding step by `torch.compile`). A prompt with several responses is as many
rows. All prompts of a workload run as one batch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import CompileConfig
from workload import Workload, make_prompts, serve


def generation_options(cache: str) -> dict[str, Any]:
    """Plain sampling with the cache that was asked for."""
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None}
    if cache != "dynamic":
        options["cache_implementation"] = "static"
    if cache == "compiled":
        compile_config = CompileConfig(fullgraph=False, dynamic=False, mode="default")
        compile_config._compile_all_devices = True  # `generate` compiles on accelerators only, unless told
        options["compile_config"] = compile_config
    return options


def main() -> None:
    """Load the model once, then answer requests."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    options = generation_options(job["cache"])

    def generate(workload: Workload) -> None:
        ids_PS = make_prompts(workload, model.config.vocab_size).repeat(workload["responses"], axis=0)
        ids = torch.from_numpy(ids_PS.astype(np.int64))
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=workload["new_tokens"], pad_token_id=0, **options
        )
        expected = (len(ids), workload["prompt_tokens"] + workload["new_tokens"])
        if tuple(made.shape) != expected:
            raise RuntimeError(f"generate made {tuple(made.shape)} tokens, expected {expected}")

    def score(ids: Sequence[int]) -> np.ndarray:
        return model(torch.tensor([ids])).logits[0, -1].float().numpy()

    serve(generate, score)


if __name__ == "__main__":
    main()
