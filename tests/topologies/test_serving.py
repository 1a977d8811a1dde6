"""Serving a run: what is picked to serve (fast), and the real thing (slow): Ray Serve and the `openai` client."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import openai
import pytest
import ray
from ray import serve

from afm_rl.config import ModelConfig
from afm_rl.errors import UserError
from afm_rl.lora import init_lora
from afm_rl.parameters import init_params
from pretrain.tokenizer_training import MIN_VOCAB_SIZE, train_tokenizer
from quant.adapter import write_adapter
from quant.operations import operation_names
from quant.package import write_package
from quant.recovery import palettize_operations, quantize_params
from topologies.serving import Serving, ServingError, serve_run, served_folder

HELLO = [{"role": "user", "content": "hello"}]


TOPOLOGY = """
name: serving
stages:
  - tokenizer
  - pretrain
  - sft
  - quantize: {bits_per_weight: [3.7, 3.5]}
"""


def touch(path: Path, *, at: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    os.utime(path, (at, at))
    return path


def make_run(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    (path / "topology.yaml").write_text(TOPOLOGY)
    return path


def test_the_first_package_is_served_before_any_policy_and_else_the_newest_policy(tmp_path: Path) -> None:
    """Guards the choice: the first target's package, which has the adapters; a reward model is not a policy."""
    run = make_run(tmp_path)
    touch(run / "policies/sft/0/tokenizer.model", at=30)
    touch(run / "policies/mdloo/0/tokenizer.model", at=40)
    touch(run / "policies/reward/0/config.json", at=50)
    assert served_folder(run) == run / "policies/mdloo/0"
    touch(run / "packages/3.5bpw/manifest.json")
    touch(run / "packages/3.7bpw/manifest.json")
    assert served_folder(run) == run / "packages/3.7bpw"


def test_nothing_to_serve_says_what_to_do(tmp_path: Path) -> None:
    """Guards the user's errors before any Ray is started: no run, an unfinished run, a port that is taken."""
    with pytest.raises(UserError, match="no run at"):
        serve_run(tmp_path / "nowhere")
    run = make_run(tmp_path)
    with pytest.raises(UserError, match="nothing to serve yet"):
        serve_run(run)
    touch(run / "policies/sft/0/tokenizer.model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {port}"):
            serve_run(run, port=port)
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """The Ray that a launch would be running already."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a palettized random model and an adapter "summary", large enough to change every answer."""
    run = make_run(tmp_path_factory.mktemp("runs") / "serving")
    texts = ["hello there, hello again"] * 20
    tokenizer = train_tokenizer(texts, vocab_size=MIN_VOCAB_SIZE + 3, folder=run / "tokenizer")
    config = ModelConfig(tokenizer.vocab_size, 16, 32, 2, 4, 2, 8, max_positions=128)
    params = init_params(config, jax.random.key(0))
    bits = {name: 4 if index % 2 else 2 for index, name in enumerate(operation_names(config.num_layers))}
    quantized = quantize_params(params, palettize_operations(params, bits))
    package = run / "packages/3.7bpw"
    write_package(package, params=quantized, config=config, bits=bits, tokenizer=tokenizer)
    lora = jax.tree.map(jnp.ones_like, init_lora(config, 2, jax.random.key(1)))
    write_adapter(package / "adapters/summary", lora, rank=2, alpha=2.0)
    return run


@pytest.fixture(scope="module")
def serving(run: Path, cluster: None) -> Iterator[Serving]:  # noqa: ARG001 (the cluster must be up)
    with serve_run(run, port=0) as serving:
        yield serving


@pytest.fixture
def client(serving: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{serving.address}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.mark.slow
def test_a_chat_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    """Guards the whole stack: the same seed gives the same text in one piece and as a stream, with usage."""
    options = {"model": "base", "messages": HELLO, "max_tokens": 24, "seed": 7}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].message.content
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.slow
def test_adapters_are_chosen_by_name(serving: Serving, client: openai.OpenAI) -> None:
    """Guards adapter swapping over HTTP: listed, answering differently, back to the base unchanged; others are 404."""
    assert serving.models == [m.id for m in client.models.list()] == ["base", "summary"]

    def ask(model: str) -> str:
        answer = client.completions.create(model=model, prompt="hello", max_tokens=16, temperature=0)
        assert answer.model == model
        return answer.choices[0].text

    base = ask("base")
    assert ask("summary") != base
    assert ask("base") == base
    with pytest.raises(openai.NotFoundError, match="available: base, summary"):
        ask("translation")


@pytest.mark.slow
def test_a_client_that_leaves_does_not_hold_the_replica(client: openai.OpenAI) -> None:
    """Guards abandoned streams through Ray Serve's proxy: the next request is answered."""
    with client.chat.completions.create(model="base", messages=HELLO, max_tokens=100, stream=True) as stream:
        next(iter(stream))
    assert client.chat.completions.create(model="base", messages=HELLO, max_tokens=4).choices


@pytest.mark.slow
def test_the_deployment_is_named_and_listens_on_loopback_only(serving: Serving) -> None:
    """Guards what the dashboard shows, and that nobody outside this machine can reach an unauthenticated server."""
    assert list(serve.status().applications["afm-rl"].deployments) == ["server"]
    assert serving.address.startswith("http://127.0.0.1:")
    port = int(serving.address.rsplit(":", 1)[1])
    with open("/proc/net/tcp") as table:
        listening = [line.split() for line in table.readlines()[1:]]
    hosts = {row[1].split(":")[0] for row in listening if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
    assert hosts == {"0100007F"}


@pytest.mark.slow
def test_stopping_frees_the_port_and_a_broken_model_is_an_error_in_time(run: Path, serving: Serving) -> None:
    """Guards the ends: after stop nothing listens, and a model that cannot be loaded is an error with its reason."""
    with pytest.raises(UserError, match="already runs"):
        serve_run(run, port=0)
    serving.stop()
    port = int(serving.address.rsplit(":", 1)[1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    broken = touch(run / "policies/broken/0/tokenizer.model").parent
    with pytest.raises(ServingError, match=r"tokenizer\.model"):
        serve_run(run, folder=broken, port=0)
    assert not serve.status().applications
    assert ray.is_initialized()
