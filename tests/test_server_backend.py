"""The server's real backend: a tiny random model, its adapters from PEFT folders, streams that interleave. No Ray."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from actors.server import ChatServer
from actors.server_backend import AdapterBackend
from actors.server_protocol import parse_chat, parse_completion
from afm_rl.config import ModelConfig
from afm_rl.generate import Generator
from afm_rl.huggingface import save_pretrained
from afm_rl.lora import PROJECTIONS, projection_shapes
from afm_rl.model import forward, logits
from afm_rl.parameters import Params, init_params
from afm_rl.quantized import dequantize_params
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import GenerationRequest
from pretrain.tokenizer_training import MIN_VOCAB_SIZE, train_tokenizer
from quant.operations import operation_names
from quant.package import write_package
from quant.recovery import palettize_operations, quantize_params

PEFT_NAMES = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {n: f"mlp.{n}_proj" for n in ("gate", "up", "down")}
PROMPT = np.array([20, 30, 40, 50], np.int32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(["hello there, hello again"] * 20, vocab_size=MIN_VOCAB_SIZE + 3, folder=folder)


@pytest.fixture(scope="module")
def config(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(tokenizer.vocab_size, 16, 32, 2, 4, 2, 8, max_positions=192)


@pytest.fixture(scope="module")
def params(config: ModelConfig) -> Params:
    return init_params(config, jax.random.key(0))


@pytest.fixture
def folder(tmp_path: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer) -> Path:
    """A policy folder with three adapters."""
    save_pretrained(params, tmp_path / "policy", config=config, tokenizer=tokenizer)
    for seed, name in enumerate(("one", "two", "three")):
        write_adapter(tmp_path / "policy", name, config, seed=seed)
    return tmp_path / "policy"


def adapter_deltas(config: ModelConfig, *, seed: int, rank: int = 4) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """projection -> (a [L, r, in], b [L, out, r]), large enough to change what a random model says."""
    rng = np.random.default_rng(seed)
    L = config.num_layers
    return {
        name: (
            rng.normal(size=(L, rank, fan_in)).astype(np.float32),
            rng.normal(size=(L, out, rank)).astype(np.float32) / 4,
        )
        for name, (out, fan_in) in projection_shapes(config).items()
    }


def write_adapter(folder: Path, name: str, config: ModelConfig, *, seed: int, rank: int = 4, alpha: float = 8.0) -> None:
    """A PEFT adapter folder, written by hand from PEFT's layout; appears whole, as a deployment would do it."""
    target = folder / "adapters" / name
    staging = folder / f"staging-{name}"
    staging.mkdir(parents=True)
    tensors = {}
    for projection, (a, b) in adapter_deltas(config, seed=seed, rank=rank).items():
        for layer in range(config.num_layers):
            prefix = f"base_model.model.model.layers.{layer}.{PEFT_NAMES[projection]}"
            tensors[f"{prefix}.lora_A.weight"] = a[layer]
            tensors[f"{prefix}.lora_B.weight"] = b[layer]
    save_file(tensors, staging / "adapter_model.safetensors")
    modules = [f"{projection}_proj" for projection in PROJECTIONS]
    peft = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": modules, "bias": "none"}
    (staging / "adapter_config.json").write_text(json.dumps(peft))
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    staging.rename(target)


def merged(params: Params, config: ModelConfig, *, seed: int, rank: int = 4, alpha: float = 8.0) -> Params:
    """The base with an adapter added to its weights in float64: W + alpha / rank * b @ a."""
    layers = dict(params["layers"])
    for name, (a, b) in adapter_deltas(config, seed=seed, rank=rank).items():
        delta = alpha / rank * np.matmul(b.astype(np.float64), a.astype(np.float64))
        layers[name] = (np.asarray(layers[name], np.float64) + delta).astype(np.float32)
    return {**params, "layers": layers}


def request(seed: int = 0) -> GenerationRequest:
    return GenerationRequest("r", PROMPT, num_responses=1, max_tokens=16, temperature=1.0, seed=seed)


def answer(backend: AdapterBackend, model: str, *, seed: int = 0) -> list[int]:
    return backend.generate(model, request(seed)).responses[0].tolist()


@partial(jax.jit, static_argnames="config")
def forward_logits(params: Params, tokens_BT: np.ndarray, *, config: ModelConfig) -> jax.Array:
    return logits(params, forward(params, tokens_BT, config=config), config)


def reference_logp(params: Params, tokens: np.ndarray, config: ModelConfig) -> np.ndarray:
    """[T - 1, V] float64: row t is the distribution of token t + 1, by a plain forward pass (padded: one program)."""
    padded = np.zeros((1, 130), np.int32)
    padded[0, : len(tokens)] = tokens
    logits64 = np.asarray(forward_logits(params, padded, config=config), np.float64)[0, : len(tokens) - 1]
    logits64 -= logits64.max(-1, keepdims=True)
    return logits64 - np.log(np.exp(logits64).sum(-1, keepdims=True))


def test_base_and_stream_say_what_the_generator_says(
    folder: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer
) -> None:
    """Guards that serving changes nothing: same tokens as a Generator on the saved weights, streamed or not."""
    backend = AdapterBackend(folder)
    generator = Generator(config, stop_ids=(tokenizer.eos_id, tokenizer.end_of_turn_id))
    generator.load(params, policy="x", version=0)
    expected = generator.generate([request(3)])[0].responses[0].tolist()
    assert answer(backend, "base", seed=3) == expected
    assert list(backend.stream("base", request(3))) == expected


@pytest.mark.parametrize(("name", "seed"), [("one", 0), ("two", 1)])
def test_adapter_by_name_equals_merged_weights(
    name: str, seed: int, folder: Path, config: ModelConfig, params: Params
) -> None:
    """Guards reading PEFT folders: names, transposes and alpha / rank, against weights merged in float64."""
    backend = AdapterBackend(folder)
    tokens = np.concatenate([PROMPT, np.arange(60, 70, dtype=np.int32)])
    scored = backend.score(name, tokens, top=3).logp_T[1:]
    expected = reference_logp(merged(params, config, seed=seed), tokens, config)
    np.testing.assert_allclose(scored, expected[np.arange(len(tokens) - 1), tokens[1:]], atol=2e-3)
    base = backend.score("base", tokens, top=3).logp_T[1:]
    assert np.abs(base - scored).max() > 0.1


@pytest.mark.parametrize("length", [2, 64, 65, 128])
def test_scores_are_those_of_one_forward_pass(length: int, folder: Path, config: ModelConfig, params: Params) -> None:
    """Guards the shift by one, padding to blocks, and that own and best figures come from the same floats."""
    backend = AdapterBackend(folder)
    tokens = np.random.default_rng(length).integers(8, config.vocab_size, length).astype(np.int32)
    scores = backend.score("base", tokens, top=3)
    expected = reference_logp(params, tokens, config)
    assert np.isnan(scores.logp_T[0])
    assert scores.top_ids_TK.shape == scores.top_logp_TK.shape == (length, 3)
    np.testing.assert_allclose(scores.logp_T[1:], expected[np.arange(length - 1), tokens[1:]], atol=1e-4)
    np.testing.assert_array_equal(scores.top_ids_TK[1:, 0], expected.argmax(-1))
    np.testing.assert_allclose(scores.top_logp_TK[1:], np.sort(expected)[:, ::-1][:, :3], atol=1e-4)
    greedy = tokens[1:] == scores.top_ids_TK[1:, 0]
    assert (scores.logp_T[1:][greedy] == scores.top_logp_TK[1:, 0][greedy]).all()


def test_a_greedy_completion_is_its_own_best_alternative(folder: Path, tokenizer: Tokenizer) -> None:
    """Guards likelihood evaluations end to end: for a greedy token, its figure equals the best one exactly."""
    server = ChatServer(AdapterBackend(folder), tokenizer)
    body = {"model": "one", "prompt": PROMPT.tolist(), "temperature": 0, "max_tokens": 8, "logprobs": 3}
    logprobs = server.completion(parse_completion(body))["choices"][0]["logprobs"]
    assert [max(best.values()) for best in logprobs["top_logprobs"]] == logprobs["token_logprobs"]
    chat = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 3}
    answer = server.chat(parse_chat({"model": "one", "temperature": 0, "max_tokens": 8, **chat}))
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    assert [entry["top_logprobs"][0]["logprob"] for entry in content] == [entry["logprob"] for entry in content]


def test_resident_adapters_are_bounded_and_least_recently_used_goes(folder: Path) -> None:
    """Guards the cache: its bound, its order, and that an evicted adapter comes back the same."""
    backend = AdapterBackend(folder, max_adapters=2)
    first = answer(backend, "one")
    answer(backend, "two")
    answer(backend, "one")
    answer(backend, "three")
    assert backend.resident == ["one", "three"]
    answer(backend, "two")
    assert backend.resident == ["three", "two"]
    assert answer(backend, "one") == first


def test_interleaved_streams_keep_their_own_weights(folder: Path) -> None:
    """Guards a stream against whatever is loaded, evicted or generated between two of its tokens."""
    backend = AdapterBackend(folder, max_adapters=1)
    alone = {name: list(backend.stream(name, request(5))) for name in ("one", "two")}
    assert alone["one"] != alone["two"]
    one, two = backend.stream("one", request(5)), backend.stream("two", request(5))
    woven: dict[str, list[int]] = {"one": [next(one)], "two": [next(two)]}
    answer(backend, "three")
    assert backend.resident == ["three"]
    woven["one"] += one
    woven["two"] += two
    assert woven == alone


def test_an_abandoned_stream_blocks_nobody(folder: Path) -> None:
    """Guards the lock: a stream that is never read on, or closed halfway, does not hold it."""
    backend = AdapterBackend(folder)
    stuck = backend.stream("base", request())
    next(stuck)
    closed = backend.stream("base", request())
    next(closed)
    closed.close()
    results: list[list[int]] = []
    thread = threading.Thread(target=lambda: results.append(answer(backend, "base")), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert len(results) == 1


def test_a_reader_that_leaves_waits_for_the_step_of_others(folder: Path) -> None:
    """Guards the engine's bookkeeping: a stream is given up between two steps, not in the middle of another thread's."""
    backend = AdapterBackend(folder)
    stream = backend.stream("base", dataclasses.replace(request(), max_tokens=100))
    next(stream)
    engine = backend._base.generator
    with backend._lock:  # as a thread that steps holds it
        leaving = threading.Thread(target=stream.close)
        leaving.start()
        leaving.join(timeout=0.3)
        assert (leaving.is_alive(), engine.unfinished) == (True, 1)
    leaving.join(timeout=30)
    assert engine.unfinished == 0


def test_threads_get_the_answers_they_would_get_alone(folder: Path) -> None:
    """Guards thread safety under adapter swaps: many callers, one adapter's room."""
    backend = AdapterBackend(folder, max_adapters=1)
    jobs = [(name, seed) for name in ("base", "one", "two") for seed in range(3)]
    alone = {(name, seed): answer(backend, name, seed=seed) for name, seed in jobs}
    found: dict[tuple[str, int], list[int]] = {}

    def ask(name: str, seed: int) -> None:
        found[name, seed] = answer(backend, name, seed=seed)

    threads = [threading.Thread(target=ask, args=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == alone


def test_adapters_that_appear_or_change_are_served(folder: Path, config: ModelConfig) -> None:
    """Guards deployment without a restart: a new adapter is listed and answers, a retrained one replaces the old."""
    backend = AdapterBackend(folder)
    assert backend.models() == ["base", "one", "three", "two"]
    write_adapter(folder, "four", config, seed=1)
    assert "four" in backend.models()
    assert answer(backend, "four") == answer(backend, "two")
    old = answer(backend, "one")
    write_adapter(folder, "one", config, seed=1)
    stamp = (folder / "adapters/one/adapter_model.safetensors").stat().st_mtime_ns + 10**9
    os.utime(folder / "adapters/one/adapter_model.safetensors", ns=(stamp, stamp))
    assert answer(backend, "one") == answer(backend, "two") != old


def test_a_package_is_served_with_its_own_numbers_and_adapters(
    tmp_path: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer
) -> None:
    """Guards palettized serving: scores of the dequantised weights, adapters on top, damage refused by file name."""
    bits = {name: 4 if index % 2 else 2 for index, name in enumerate(operation_names(config.num_layers))}
    quantized = quantize_params(params, palettize_operations(params, bits))
    package = tmp_path / "package"
    write_package(package, params=quantized, config=config, bits=bits, tokenizer=tokenizer)
    write_adapter(package, "one", config, seed=0)
    backend = AdapterBackend(package)
    dense = dequantize_params(quantized)
    tokens = np.concatenate([PROMPT, np.arange(60, 70, dtype=np.int32)])
    rows = np.arange(len(tokens) - 1)
    for name, weights in (("base", dense), ("one", merged(dense, config, seed=0))):
        expected = reference_logp(weights, tokens, config)[rows, tokens[1:]]
        np.testing.assert_allclose(backend.score(name, tokens, top=3).logp_T[1:], expected, atol=2e-3)
    weights_file = package / "palettized.safetensors"
    damaged = bytearray(weights_file.read_bytes())
    damaged[-1] ^= 1
    weights_file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"palettized\.safetensors is damaged"):
        AdapterBackend(package)


def test_what_cannot_be_loaded_says_so(folder: Path, config: ModelConfig, tmp_path: Path) -> None:
    """Guards errors: no such model, an adapter made for another shape, a folder that is no model."""
    backend = AdapterBackend(folder)
    with pytest.raises(KeyError, match=r"'five'.*available: base, one, three, two"):
        answer(backend, "five")
    write_adapter(folder, "wide", config.replace(ffn_dim=48), seed=0)
    with pytest.raises(ValueError, match="wide"):
        answer(backend, "wide")
    assert answer(backend, "one")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        AdapterBackend(tmp_path / "empty")
