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
from afm_rl.huggingface import UnsupportedCheckpointError, load_config, load_params, load_pretrained, save_pretrained
from afm_rl.model import ParamSpec, Transformer, param_specs
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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type = 'yarn'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters.rope_type = 'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = "),
    ],
)
def test_what_the_architecture_lacks_is_refused_by_name(qwen, change, named):
    """Loading such a checkpoint all the same would give wrong numbers without a word."""
    edit_config(qwen, **change)
    with pytest.raises(UnsupportedCheckpointError, match=named):
        load_pretrained(qwen)


def test_a_bare_rope_theta_is_read(qwen):
    """Checkpoints of earlier transformers have rope_theta at the top level; without either it is an error."""
    edit_config(qwen, rope_parameters=None, rope_theta=10_000)
    assert load_config(qwen).rope_base == 10_000.0
    edit_config(qwen, rope_parameters=None, rope_theta=7)
    path = qwen / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "rope_theta"}))
    with pytest.raises(UnsupportedCheckpointError, match="rope_theta"):
        load_config(qwen)


def test_tensor_refusals(qwen):
    """Missing, additional, misshapen and integer tensors are each named."""
    file = qwen / "model.safetensors"
    arrays = {name: np.array(array) for name, array in read_safetensors(file).items()}
    norm = "model.norm.weight"
    cases = {
        f"{norm} is missing": {name: a for name, a in arrays.items() if name != norm},
        "q_proj.bias has no place": arrays | {"model.layers.0.self_attn.q_proj.bias": np.zeros(128, np.float32)},
        f"{norm} has shape": arrays | {norm: np.ones(127, np.float32)},
        f"{norm} is int8": arrays | {norm: np.ones(128, np.int8)},
        "lm_head.weight has no place": arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"] + 1},
    }
    for message, changed in cases.items():
        write_safetensors(file, changed)
        with pytest.raises(UnsupportedCheckpointError, match=message):
            load_params(qwen)
    write_safetensors(file, arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]})
    assert_same_tree(load_params(qwen)[1], load_params(QWEN)[1])


def test_missing_files_are_named(qwen):
    """A folder without its parts says which one."""
    (qwen / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        load_params(qwen)
    (qwen / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        load_params(qwen)


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


def test_transformers_computes_the_same_logits(tmp_path):
    """What we write, they load and run to our logits (where torch and transformers are installed)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = small_params()
    tokenizer = train_tokenizer([pydoc_data.topics.topics["assert"]], vocab_size=SMALL.vocab_size, folder=tmp_path)
    save_pretrained(params, tmp_path, config=SMALL, tokenizer=tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("An assertion: x == 12")["input_ids"]
    assert ids == tokenizer.encode("An assertion: x == 12")
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(Transformer(SMALL, params)(jnp.asarray([ids])), expected, atol=1e-5)
