"""Hugging Face interchange: their numbers from their files, exact round trips, refusals by name."""

import json
import pydoc_data.topics
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.config import ModelConfig
from afm_rl.huggingface import copy_pretrained, load_config, load_params, load_pretrained, save_pretrained
from afm_rl.model import Transformer
from afm_rl.parameters import ParamSpec, param_specs
from afm_rl.safetensors_file import read_safetensors, write_safetensors
from afm_rl.tokenizer import Tokenizer
from afm_rl.weights import leaves
from pretrain.tokenizer_training import train_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
QWEN = FIXTURES / "qwen3_tiny"
SMALL = ModelConfig(400, 16, 24, 2, 4, 2, 8, rope_base=6_315_089.0, norm_eps=1e-5, max_positions=64)


def small_params(config=SMALL, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def draw(spec):
        return jnp.asarray(rng.normal(size=spec.shape, scale=spec.std or 1.0), dtype)

    return jax.tree.map(draw, param_specs(config), is_leaf=lambda node: isinstance(node, ParamSpec))


def assert_same_tree(a, b):
    a, b = dict(leaves(a)), dict(leaves(b))
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


@pytest.fixture
def qwen(tmp_path):
    """A copy of the fixture that a test may spoil."""
    shutil.copytree(QWEN, tmp_path / "qwen")
    return tmp_path / "qwen"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_logits_equal_transformers():
    """Their checkpoint gives their logits: swapped tensors, forgotten gains or another RoPE order would show."""
    oracle = np.load(FIXTURES / "qwen3_tiny_forward.npz")
    model = load_pretrained(QWEN)
    logits_BTV = model(jnp.asarray(oracle["input_ids"][:1], jnp.int32))
    np.testing.assert_allclose(logits_BTV[0], oracle["logits_f64"][0], atol=1e-4, rtol=0)
    # Row 1 is left-padded there, which changes nothing: its 17 real tokens alone must give the same.
    logits_BTV = model(jnp.asarray(oracle["input_ids"][1:, 7:], jnp.int32))
    np.testing.assert_allclose(logits_BTV[0], oracle["logits_f64"][1, 7:], atol=1e-4, rtol=0)


def test_swapped_tensors_would_show(qwen):
    """The oracle is sharp enough: exchanging two tensors of one shape moves the logits far."""
    arrays = read_safetensors(qwen / "model.safetensors")
    gate, up = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
    write_safetensors(qwen / "swapped", arrays | {gate: arrays[up], up: arrays[gate]})
    (qwen / "swapped").replace(qwen / "model.safetensors")
    oracle = np.load(FIXTURES / "qwen3_tiny_forward.npz")
    logits_BTV = load_pretrained(qwen)(jnp.asarray(oracle["input_ids"][:1], jnp.int32))
    assert np.abs(np.asarray(logits_BTV[0]) - oracle["logits_f64"][0]).max() > 0.1


def test_config_of_the_fixture():
    """Every key of their config.json that shapes the model arrives."""
    assert load_config(QWEN) == ModelConfig(
        2048, 128, 384, 4, 4, 2, 32, rope_base=500_000.0, norm_eps=1e-6, tie_embeddings=True, max_positions=2048
    )


def test_fixture_round_trip_is_exact(tmp_path):
    """Load and save gives back every tensor of theirs, bit for bit, under its own name."""
    save_pretrained(load_pretrained(QWEN), tmp_path)
    theirs, ours = read_safetensors(QWEN / "model.safetensors"), read_safetensors(tmp_path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(theirs[name], ours[name])
    assert load_config(tmp_path) == load_config(QWEN)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_round_trip_is_exact(tmp_path, tied, dtype):
    """Parameters and configuration come back as they were, tied or not, in either dtype."""
    config = SMALL.replace(tie_embeddings=tied)
    params = small_params(config, jnp.dtype(dtype))
    save_pretrained(params, tmp_path, config=config)
    loaded_config, loaded = load_params(tmp_path, dtype=dtype)
    assert loaded_config == config
    assert_same_tree(params, loaded)


def test_the_library_reads_our_file(tmp_path):
    """model.safetensors is what the safetensors library accepts, with the metadata transformers asks for."""
    safetensors = pytest.importorskip("safetensors")
    params = small_params()
    save_pretrained(Transformer(SMALL, params), tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(file.keys()) == 2 + 11 * SMALL.num_layers
        down = file.get_tensor("model.layers.1.mlp.down_proj.weight")
    np.testing.assert_array_equal(down, params["layers"]["down"][1])


def test_load_casts(tmp_path):
    """A float32 checkpoint loads as bfloat16 when asked."""
    save_pretrained(small_params(), tmp_path, config=SMALL)
    model = load_pretrained(tmp_path, "bfloat16")
    assert {leaf.dtype.name for _, leaf in leaves(model.params)} == {"bfloat16"}


def test_tokenizer_files(tmp_path):
    """A policy folder carries its tokenizer in both forms, and generation there stops where ours does."""
    tokenizer = train_tokenizer([pydoc_data.topics.topics["assert"]], vocab_size=SMALL.vocab_size, folder=tmp_path / "t")
    save_pretrained(small_params(), tmp_path / "policy", config=SMALL, tokenizer=tokenizer)
    assert Tokenizer.load(tmp_path / "policy").fingerprint == tokenizer.fingerprint
    generation = json.loads((tmp_path / "policy" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.end_of_turn_id, tokenizer.eos_id]
    vocabulary = json.loads((tmp_path / "policy" / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) == SMALL.vocab_size
    hf = json.loads((tmp_path / "policy" / "tokenizer_config.json").read_text())
    assert (hf["pad_token"], hf["model_max_length"]) == ("<|pad|>", SMALL.max_positions)
    small = SMALL.replace(vocab_size=390)
    with pytest.raises(ValueError, match="the tokenizer has 400 entries, the model only 390"):
        save_pretrained(small_params(small), tmp_path / "other", config=small, tokenizer=tokenizer)


def test_sharded_checkpoint(qwen):
    """A checkpoint split over files, as their larger ones are, gives the same parameters."""
    arrays = read_safetensors(qwen / "model.safetensors")
    names = sorted(arrays)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, part in parts.items():
        write_safetensors(qwen / file, {name: arrays[name] for name in part})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (qwen / "model.safetensors.index.json").write_text(json.dumps(index))
    (qwen / "model.safetensors").unlink()
    assert_same_tree(load_params(qwen)[1], load_params(QWEN)[1])


def test_save_refuses_what_is_not_the_model(tmp_path):
    """Foreign leaves, shapes and trees are refused before anything is written."""
    params = small_params()
    for changed, message in (
        (params | {"score": jnp.ones(3)}, "no place for the parameters score"),
        ({k: v for k, v in params.items() if k != "final_norm"}, "lack final_norm"),
        (params | {"final_norm": jnp.ones(3)}, "final_norm has shape"),
        (params | {"final_norm": [1.0]}, "final_norm is a list"),
    ):
        with pytest.raises(ValueError, match=message):
            save_pretrained(changed, tmp_path / "out", config=SMALL)
    with pytest.raises(ValueError, match="needs config="):
        save_pretrained(params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 6000])
def test_hugging_face_to_ours_and_back_is_exact(tmp_path, dtype, max_shard_bytes):
    """A folder of theirs in any float dtype, one file or many: every tensor comes back bit for bit."""
    save_pretrained(small_params(dtype=jnp.dtype(dtype)), tmp_path / "theirs", config=SMALL, max_shard_bytes=max_shard_bytes)
    save_pretrained(load_pretrained(tmp_path / "theirs", dtype), tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    theirs, ours = ({p.name: p.read_bytes() for p in (tmp_path / at).iterdir()} for at in ("theirs", "ours"))
    assert theirs == ours
    assert len(theirs) == (2 if max_shard_bytes > 6000 else len(list((tmp_path / "ours").glob("model-*"))) + 2)


def test_shards_and_their_index(tmp_path):
    """Every tensor is in one file, no file is larger than asked unless by one tensor, the index says all of it."""
    save_pretrained(small_params(), tmp_path, config=SMALL, max_shard_bytes=6000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {path.name: read_safetensors(path) for path in tmp_path.glob("model-*.safetensors")}
    assert sorted(files) == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 3
    assert index["weight_map"] == {name: file for file, arrays in files.items() for name in arrays}
    assert index["metadata"]["total_size"] == sum(a.nbytes for arrays in files.values() for a in arrays.values())
    for arrays in files.values():
        assert len(arrays) == 1 or sum(array.nbytes for array in arrays.values()) <= 6000
    assert_same_tree(load_params(tmp_path)[1], small_params())


@pytest.mark.parametrize(("first", "second"), [(6000, 9000), (6000, 10**9), (10**9, 6000)])
def test_an_earlier_save_leaves_nothing(tmp_path, first, second):
    """Other shard counts over the same folder: the new weights load, and no old file is left to confuse anyone."""
    save_pretrained(small_params(), tmp_path, config=SMALL, max_shard_bytes=first)
    changed = jax.tree.map(lambda leaf: leaf + 1, small_params())
    save_pretrained(changed, tmp_path, config=SMALL, max_shard_bytes=second)
    save_pretrained(changed, tmp_path / "fresh", config=SMALL, max_shard_bytes=second)
    fresh = {path.name for path in (tmp_path / "fresh").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == fresh | {"fresh"}
    assert_same_tree(load_params(tmp_path)[1], changed)


@pytest.mark.parametrize("written", range(4))
def test_a_save_that_dies_never_passes_for_whole(tmp_path, monkeypatch, written):
    """Killed after any number of renames and index writes over an older save: the folder does not load."""
    save_pretrained(small_params(), tmp_path, config=SMALL, max_shard_bytes=20_000)
    replace, left = Path.replace, written

    def dying(self, target):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    changed = jax.tree.map(lambda leaf: leaf + 1, small_params())
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(changed, tmp_path, config=SMALL, max_shard_bytes=20_000)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_params(tmp_path)
    save_pretrained(changed, tmp_path, config=SMALL, max_shard_bytes=20_000)
    assert_same_tree(load_params(tmp_path)[1], changed)
    assert not list(tmp_path.glob(".*"))


def test_a_foreign_tokenizer_travels_with_its_policy(foreign_tokenizer, tmp_path):
    """Its files are there byte for byte, and config.json names its ends."""
    tokenizer = Tokenizer.load(foreign_tokenizer)
    config = SMALL.replace(vocab_size=1024)
    save_pretrained(small_params(config), tmp_path, config=config, tokenizer=tokenizer)
    for path in foreign_tokenizer.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    assert Tokenizer.load(tmp_path).stop_ids == tokenizer.stop_ids


def test_copy_is_exact_and_casts(qwen, tmp_path):
    """Checked and streamed without a model in between: same tensors, or the same values in another dtype."""
    seen = []
    copied = copy_pretrained(qwen, tmp_path / "a", on_tensor=lambda done, total: seen.append((done, total)))
    assert (copied.dtype, copied.tensors, copied.weights_bytes) == ("float32", 46, 4 * 1_049_984)
    assert seen == [(i + 1, 46) for i in range(46)]
    assert_same_tree(load_params(tmp_path / "a")[1], load_params(QWEN)[1])
    assert copy_pretrained(qwen, tmp_path / "b", dtype="bfloat16", max_shard_bytes=10**6).dtype == "bfloat16"
    assert_same_tree(load_params(tmp_path / "b", dtype="bfloat16")[1], load_params(QWEN, dtype="bfloat16")[1])
