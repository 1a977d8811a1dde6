"""For real: transformers loads what we save and computes our logits, we load what it saves, its tokenizer gives our ids.

Needs torch and transformers, here (`pip install -e .[interop]`) or in the environment of the Python that
AFM_RL_TRANSFORMERS_PYTHON names; skipped without.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.config import ModelConfig
from afm_rl.huggingface import copy_pretrained, load_params, load_pretrained, save_pretrained
from afm_rl.parameters import ParamSpec, param_specs
from afm_rl.safetensors_file import read_safetensors
from afm_rl.tokenizer import Tokenizer
from afm_rl.types import Message

PEER = Path(__file__).parent / "transformers_peer.py"
HERE = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
PYTHON = sys.executable if HERE else os.environ.get("AFM_RL_TRANSFORMERS_PYTHON")
CONFIG = ModelConfig(1000, 32, 48, 3, 6, 2, 16, rope_base=54_321.0, norm_eps=2e-5, max_positions=64)
IDS = np.random.default_rng(1).integers(0, 300, (2, 12))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="transformers is not installed: pip install -e .[interop]"),
]


def ask(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(PYTHON), str(PEER), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr


def their_logits(folder, scratch):
    np.save(scratch / "ids.npy", IDS)
    ask("logits", folder, scratch / "ids.npy", scratch / "logits.npy")
    return np.load(scratch / "logits.npy")


@pytest.mark.parametrize(("tied", "max_shard_bytes"), [(True, 10**9), (False, 10_000)])
def test_transformers_loads_what_we_save(foreign_tokenizer, tmp_path, tied, max_shard_bytes):
    """One file or many, tied or not: their logits on our folder are ours."""
    config, rng = CONFIG.replace(tie_embeddings=tied), np.random.default_rng(0)

    def draw(spec):
        return jnp.asarray(rng.normal(1.0 if spec.std is None else 0.0, spec.std or 0.2, spec.shape), jnp.float32)

    params = jax.tree.map(draw, param_specs(config), is_leaf=lambda node: isinstance(node, ParamSpec))
    folder = tmp_path / "saved"
    tokenizer = Tokenizer.load(foreign_tokenizer)
    save_pretrained(params, folder, config=config, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)
    assert len(list(folder.glob("model*.safetensors"))) == (1 if tied else len(list(folder.glob("model-*-of-*"))))
    ours = np.asarray(load_pretrained(folder)(jnp.asarray(IDS, jnp.int32)))
    np.testing.assert_allclose(ours, their_logits(folder, tmp_path), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("tied", "shard", "dtype"), [("tied", "5GB", "float32"), ("untied", "20KB", "bfloat16")])
def test_we_load_what_transformers_saves(tmp_path, tied, shard, dtype):
    """Their folder gives their logits here, and written again it holds their tensors bit for bit."""
    folder = tmp_path / "theirs"
    ask("make", folder, tied, shard, dtype)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) == 1 if shard == "5GB" else len(files) > 5
    ours = np.asarray(load_pretrained(folder)(jnp.asarray(IDS, jnp.int32)))
    np.testing.assert_allclose(ours, their_logits(folder, tmp_path), atol=2e-5, rtol=1e-5)
    config, params = load_params(folder, dtype=dtype)
    assert (config.rope_base, config.norm_eps, config.tie_embeddings) == (12345.0, 3e-6, tied == "tied")
    save_pretrained(params, tmp_path / "again", config=config)
    copy_pretrained(folder, tmp_path / "copied")
    theirs = {name: array for file in files for name, array in read_safetensors(folder / file).items()}
    for at in ("again", "copied"):
        found = read_safetensors(tmp_path / at / "model.safetensors")
        assert found.keys() == theirs.keys()
        assert all(found[name].tobytes() == theirs[name].tobytes() for name in theirs)


@pytest.mark.parametrize("template", ["own", "none"])
def test_ids_of_texts_and_conversations(foreign_tokenizer, tmp_path, template):
    """AutoTokenizer and apply_chat_template on the same folder; without a template ours is given to it as a file."""
    for path in foreign_tokenizer.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if template == "none":
        from afm_rl.tokenizer_chat import PLAIN_TEMPLATE

        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        del settings["chat_template"]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = Tokenizer.load(tmp_path)
        (tmp_path / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    else:
        tokenizer = Tokenizer.load(tmp_path)
    texts = ["", "an  assert\n\n x == 12 ", "naïve 日本語 🎉", "<think>\nx\n</think>"]
    chats = [
        [("user", "37 + 25?")],
        [("system", "be kind\n"), ("user", " hi "), ("assistant", "\n62"), ("user", "é🎉")],
    ]
    asked = {"texts": texts, "chats": [[{"role": r, "content": c} for r, c in turns] for turns in chats]}
    (tmp_path / "request.json").write_text(json.dumps(asked))
    ask("chat", tmp_path, tmp_path / "request.json", tmp_path / "answer.json")
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["texts"] == [tokenizer.encode(text) for text in texts]
    assert answer["decoded"] == [tokenizer.decode(ids) for ids in answer["texts"]]
    for add, theirs in zip((False, True), answer["chats"], strict=True):
        ours = [tokenizer.encode_chat([Message(r, c) for r, c in turns], add_generation_prompt=add) for turns in chats]
        assert ours == theirs
