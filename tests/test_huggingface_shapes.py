"""Every published dense Qwen3: config.json accepted with the known parameter count, proportions that round-trip."""

import json
from typing import NamedTuple

import jax
import numpy as np
import pytest

from afm_rl.config import ModelConfig
from afm_rl.huggingface import load_config, load_params, load_pretrained, save_pretrained
from afm_rl.parameters import ParamSpec, param_specs
from afm_rl.weights import leaves


class Published(NamedTuple):
    """Values of the published config.json, and the parameters of the published weights."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    positions: int
    parameters: int


#: head_dim 128, vocabulary 151,936, RoPE base 1e6 and eps 1e-6 are common to all.
QWEN3 = {
    "0.6B": Published(1024, 3072, 28, 16, 8, True, 40960, 596_049_920),
    "1.7B": Published(2048, 6144, 28, 16, 8, True, 40960, 1_720_574_976),
    "4B": Published(2560, 9728, 36, 32, 8, True, 40960, 4_022_468_096),
    "8B": Published(4096, 12288, 36, 32, 8, False, 40960, 8_190_735_360),
    "14B": Published(5120, 17408, 40, 40, 8, False, 40960, 14_768_307_200),
    "32B": Published(5120, 25600, 64, 64, 8, False, 40960, 32_762_123_264),
}


def config_json(shape):
    """The file as it is published, spelt as transformers 4.51 wrote it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.positions,
        "max_window_layers": shape.layers,
        "model_type": "qwen3",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


def count(shape):
    """Parameters from the published values alone, matrix by matrix."""
    queries, keys = shape.heads * 128, shape.kv_heads * 128
    attention = 2 * shape.hidden * queries + 2 * shape.hidden * keys + 2 * 128
    layer = attention + 3 * shape.hidden * shape.ffn + 2 * shape.hidden
    return shape.layers * layer + shape.hidden + 151936 * shape.hidden * (1 if shape.tied else 2)


@pytest.mark.parametrize("name", QWEN3)
def test_published_configuration(tmp_path, name):
    """Accepted, every value where it belongs, and exactly as many parameters as were published."""
    shape = QWEN3[name]
    (tmp_path / "config.json").write_text(json.dumps(config_json(shape)))
    config = load_config(tmp_path)
    assert config == ModelConfig(
        151936,
        shape.hidden,
        shape.ffn,
        shape.layers,
        shape.heads,
        shape.kv_heads,
        128,
        rope_base=1e6,
        norm_eps=1e-6,
        tie_embeddings=shape.tied,
        max_positions=shape.positions,
    )
    assert count(shape) == shape.parameters
    assert config.num_params == shape.parameters


@pytest.mark.parametrize("name", QWEN3)
def test_its_proportions_round_trip(tmp_path, name):
    """The same model at 1/64 of the width and an eighth of head_dim: head_dim x heads != dim, GQA 2 to 8, tied or not."""
    shape = QWEN3[name]
    config = ModelConfig(
        200,
        shape.hidden // 64,
        shape.ffn // 64,
        3,
        shape.heads,
        shape.kv_heads,
        16,
        rope_base=1e6,
        norm_eps=1e-6,
        tie_embeddings=shape.tied,
        max_positions=32,
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: rng.standard_normal(spec.shape, np.float32),
        param_specs(config),
        is_leaf=lambda node: isinstance(node, ParamSpec),
    )
    save_pretrained(params, tmp_path, config=config)
    assert load_params(tmp_path)[0] == config
    model = load_pretrained(tmp_path)
    for path, leaf in leaves(model.params):
        np.testing.assert_array_equal(np.asarray(leaf), dict(leaves(params))[path], err_msg=path)
