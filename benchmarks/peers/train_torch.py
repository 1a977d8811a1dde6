"""The peer's side of `benchmarks/learner.py`: transformers' Qwen3 trained by plain PyTorch, in an environment of its own.

    /path/to/torch/python benchmarks/peers/train_torch.py '{"size": "small", "mode": "autocast", "compiled": true, ...}'

It answers lines on standard input: a number of steps to run gives one JSON line with the seconds of each step and the
process's peak memory. The model starts from transformers' own random initialisation; the batch is the same every step.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, Qwen3Config


def build_step(job: dict[str, Any]) -> Callable[[], float]:
    """One step: next-token loss, forward, backward, AdamW; returns the loss."""
    torch.manual_seed(0)
    torch.set_num_threads(job["threads"])
    shape = job["shape"]
    config = Qwen3Config(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["dim"],
        intermediate_size=shape["ffn_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    model = AutoModelForCausalLM.from_config(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, foreach=True)
    ids = torch.randint(4, shape["vocab_size"], (job["batch"], job["tokens"] + 1))
    forward = torch.compile(model) if job["compiled"] else model

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=job["mode"] == "autocast"):
            logits = forward(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main() -> None:
    """Build the step once, then run as many as each line of standard input asks for."""
    step = build_step(json.loads(sys.argv[1]))
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            before = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - before)
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print("RESULT " + json.dumps({"seconds": seconds, "peak_mib": peak_mib, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
