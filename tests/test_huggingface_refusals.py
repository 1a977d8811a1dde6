"""What this architecture does not cover is refused, and what is broken is found, each by its name."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from afm_rl.huggingface import (
    IncompleteCheckpointError,
    UnsupportedCheckpointError,
    load_config,
    load_params,
    load_pretrained,
)
from afm_rl.safetensors_file import read_safetensors, write_safetensors
from afm_rl.weights import leaves

QWEN = Path(__file__).parent / "fixtures" / "qwen3_tiny"
INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
ROPE_KINDS = ("yarn", "linear", "dynamic", "llama3", "longrope")


@pytest.fixture
def qwen(tmp_path):
    """A copy of the fixture that a test may spoil."""
    shutil.copytree(QWEN, tmp_path / "qwen")
    return tmp_path / "qwen"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same_tree(a, b):
    a, b = dict(leaves(a)), dict(leaves(b))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type = 'llama' .* no QK-norm"),
        ({"model_type": "qwen2"}, "model_type = 'qwen2' .* no QK-norm and has biases on the query"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "model_type = 'qwen3_moe' .* mixture of experts"),
        ({"num_experts": 128}, "num_experts = 128"),
        ({"model_type": "zamba"}, "model_type = 'zamba'"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures = .*Qwen3ForSequenceClassification"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type = 'yarn'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters.rope_type = 'yarn'"),
        *[({"rope_scaling": {"rope_type": kind, "factor": 4.0}}, f"rope_type = '{kind}'") for kind in ROPE_KINDS],
        *[({"rope_scaling": {"type": kind, "factor": 4.0}}, f"rope_type = '{kind}'") for kind in ROPE_KINDS],
        *[({"rope_parameters": {"rope_type": kind, "rope_theta": 1e6}}, f"rope_type = '{kind}'") for kind in ROPE_KINDS],
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = "),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = 'gptq'"),
        ({"num_key_value_heads": 3}, "num_heads .4. must be a multiple"),
        ({"num_hidden_layers": 2.0}, "config.json: num_hidden_layers must be an integer, .* it is 2.0"),
        *[({key: "64"}, f"config.json: {key} must be an integer, .* it is '64'") for key in INTEGERS],
        *[({key: value}, f"{key} must be an integer, at least 1") for key in INTEGERS for value in (0, True, [4])],
        *[({"rms_norm_eps": value}, "rms_norm_eps must be a number above 0") for value in ("1e-6", None, 0, float("nan"))],
        ({"rope_parameters": {"rope_theta": "1e6"}}, "config.json: rope_theta must be a number above 0, .* it is '1e6'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, .* it is 'false'"),
        ({"layer_types": 5}, "layer_types = 5 .only a list"),
        ({"layer_types": [["full_attention"]]}, "layer_types has .*full_attention"),
        ({"architectures": "LlamaForCausalLM"}, "architectures = 'LlamaForCausalLM'"),
        ({"model_type": ["qwen3"]}, r"model_type = \['qwen3'\]"),
    ],
)
def test_what_the_architecture_lacks_is_refused_by_name(qwen, change, named):
    """Loading such a checkpoint all the same would give wrong numbers without a word."""
    edit_config(qwen, **change)
    with pytest.raises(UnsupportedCheckpointError, match=named) as caught:
        load_pretrained(qwen)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [*(key for key in INTEGERS if key != "head_dim"), "rms_norm_eps", "rope_parameters"])
def test_what_gives_the_shape_must_be_there(qwen, key):
    """Guessing it, even as transformers does, would give another model without a word."""
    path = qwen / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    named = "rope_theta" if key == "rope_parameters" else key
    with pytest.raises(UnsupportedCheckpointError, match=rf"config\.json has no key '{named}'; add it"):
        load_config(qwen)


def test_one_architecture_may_be_a_string(qwen):
    """Some tools write the one class without the list."""
    edit_config(qwen, architectures="Qwen3ForCausalLM")
    assert load_config(qwen) == load_config(QWEN)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_without_the_right_to_read_it_is_named(qwen, monkeypatch, name):
    """The folder was made by somebody else."""
    monkeypatch.chdir(qwen)
    (qwen / name).chmod(0)
    user = os.geteuid()
    if user == 0:  # may read everything
        os.seteuid(65_534)
    try:
        with pytest.raises(IncompleteCheckpointError, match=rf"{name} cannot be read .Permission denied.; check"):
            load_params(".")
    finally:
        os.seteuid(user)


def test_files_where_folders_belong(qwen):
    """A path one too deep, or a folder under a file's name, is said so."""
    with pytest.raises(IncompleteCheckpointError, match=r"model\.safetensors is not a folder; give the folder that holds"):
        load_params(qwen / "model.safetensors")
    (qwen / "config.json").unlink()
    (qwen / "config.json").mkdir()
    with pytest.raises(IncompleteCheckpointError, match=r"config\.json is a folder, where a file belongs"):
        load_params(qwen)


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
    """A folder without its parts says which one; weights in another format are named."""
    arrays = read_safetensors(qwen / "model.safetensors")
    write_safetensors(qwen / "model-00001-of-00002.safetensors", arrays)
    names = dict.fromkeys(arrays, "model-00001-of-00002.safetensors") | {"x": "model-00002-of-00002.safetensors"}
    (qwen / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (qwen / "model.safetensors").unlink()
    with pytest.raises(IncompleteCheckpointError, match=r"lacks model-00002-of-00002\.safetensors"):
        load_params(qwen)
    shutil.copy(qwen / "model-00001-of-00002.safetensors", qwen / "model-00002-of-00002.safetensors")
    with pytest.raises(UnsupportedCheckpointError, match=r"model-00002-of-00002\.safetensors: .* is in model-00001-of"):
        load_params(qwen)
    for name in (5, None, ["model-00001-of-00002.safetensors"], ""):
        (qwen / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names | {"x": name}}))
        with pytest.raises(UnsupportedCheckpointError, match=r"index\.json: weight_map\['x'\] must be the name of a file"):
            load_params(qwen)
    (qwen / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UnsupportedCheckpointError, match=r"index\.json has no weight_map"):
        load_params(qwen)
    (qwen / "model.safetensors.index.json").unlink()
    (qwen / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(IncompleteCheckpointError, match=r"of pytorch_model\.bin nothing is read"):
        load_params(qwen)
    (qwen / "config.json").write_text("[1]")
    with pytest.raises(UnsupportedCheckpointError, match=r"config\.json is not a JSON object"):
        load_params(qwen)
    (qwen / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        load_params(qwen)


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_truncated_file_is_named(qwen, keep):
    """Cut inside the length, the header or the last array: the file's name, never a NumPy error."""
    file = qwen / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UnsupportedCheckpointError, match=r"model\.safetensors: .*truncated"):
        load_pretrained(qwen)


def test_what_may_be_left_out_means_theirs(qwen):
    """Absent keys mean what their configuration says: head_dim 128, untied tables; null kv heads: as many as heads."""
    path = qwen / "config.json"
    hf = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("head_dim", "tie_word_embeddings")}
    path.write_text(json.dumps(hf | {"num_key_value_heads": None}))
    config = load_config(qwen)
    assert (config.head_dim, config.tie_embeddings, config.num_kv_heads) == (128, False, 4)
    with pytest.raises(UnsupportedCheckpointError, match=r"config\.json says"):
        load_params(qwen)
