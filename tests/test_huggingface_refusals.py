"""What this architecture does not cover is refused, and what is broken is found, each by its name."""

import json
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
        ({"hidden_size": "wide"}, "config.json: "),
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
    """Absent keys have the meaning that their configuration gives them: head_dim 128, as many kv heads as heads."""
    path = qwen / "config.json"
    hf = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("head_dim", "num_key_value_heads")}
    path.write_text(json.dumps(hf))
    config = load_config(qwen)
    assert (config.head_dim, config.num_kv_heads) == (128, 4)
    with pytest.raises(UnsupportedCheckpointError, match=r"config\.json says"):
        load_params(qwen)
