"""Models in Hugging Face's layout, both ways and exactly: the architecture is theirs called Qwen3ForCausalLM (paper 2).

A folder holds config.json, model.safetensors (one tensor per layer and projection, [out, in] as here) and, with a
tokenizer, tokenizer.model (ours), tokenizer.json, tokenizer_config.json and generation_config.json. A checkpoint that
asks for anything this architecture does not have (biases, sliding windows, scaled RoPE, quantised weights, other
tensors) is refused by that name: loading it all the same would give wrong numbers quietly. Files are memory maps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afm_rl.config import ModelConfig
from afm_rl.errors import UserError
from afm_rl.model import Transformer
from afm_rl.parameters import Params, ParamSpec, param_specs
from afm_rl.safetensors_file import read_safetensors, write_safetensors
from afm_rl.tokenizer import Tokenizer
from afm_rl.tokenizer_export import tokenizer_config, tokenizer_json
from afm_rl.weights import leaves, to_device

_TOP_NAMES = {
    "embed/weight": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head/weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_WEIGHTS_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("float64", "float32", "float16", "bfloat16")
#: config.json keys that change the computation, and the only values of them that this architecture computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen3",),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "rope_scaling": (None,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}


class UnsupportedCheckpointError(UserError, ValueError):
    """A Hugging Face folder that this architecture cannot hold, or that is incomplete."""


@dataclass(frozen=True)
class _Tensor:
    """Where one Hugging Face tensor lives in our tree: a whole leaf, or layer `layer` of a stacked one."""

    path: str
    layer: int | None
    shape: tuple[int, ...]


def save_pretrained(
    params_or_model: Params | Transformer,
    folder: str | os.PathLike[str],
    *,
    config: ModelConfig | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a policy as a Hugging Face folder, in the dtype its parameters have; config.json comes last.

    Raises ValueError when the parameters are not those of `config` (adapters must be merged, palettized weights
    dequantised first), or the tokenizer's vocabulary is larger than the model's.
    """
    if isinstance(params_or_model, Transformer):
        params, config = params_or_model.params, config or params_or_model.config
    else:
        params = params_or_model
    if config is None:
        raise ValueError("save_pretrained needs config= with a parameter tree (a Transformer carries its own)")
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} entries, the model only {config.vocab_size}")
    ours = _checked_leaves(params, config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: ours[tensor.path] if tensor.layer is None else ours[tensor.path][tensor.layer]
        for name, tensor in _tensors(config).items()
    }
    temporary = folder / f".{_WEIGHTS_FILE}.{os.getpid()}.tmp"
    write_safetensors(temporary, tensors, metadata={"format": "pt"})
    temporary.replace(folder / _WEIGHTS_FILE)
    if tokenizer is not None:
        tokenizer.save(folder)
        _write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
        _write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, max_positions=config.max_positions))
        _write_json(folder / "generation_config.json", _generation_config(tokenizer))
    _write_json(folder / "config.json", _to_hf_config(config, tokenizer, dtype=ours["embed/weight"].dtype.name))


def load_pretrained(folder: str | os.PathLike[str], dtype: str = "float32") -> Transformer:
    """The model of a Hugging Face folder on the default device, its weights cast to `dtype`. Raises as load_params."""
    config, params = load_params(folder, dtype=dtype)
    return Transformer(config, to_device(params))


def load_params(folder: str | os.PathLike[str], *, dtype: str = "float32") -> tuple[ModelConfig, Params]:
    """(configuration, parameters as NumPy arrays of `dtype`) of a Hugging Face folder.

    Raises FileNotFoundError for what is missing and UnsupportedCheckpointError, naming the key or the tensor, for what
    this architecture does not cover.
    """
    folder = Path(folder)
    config = load_config(folder)
    stored: dict[str, np.ndarray] = {}
    for file in _weight_files(folder):
        stored |= read_safetensors(file)
    wanted = _tensors(config)
    _check_tensors(stored, wanted, tied=config.tie_embeddings, folder=folder)
    params = jax.tree.map(
        lambda spec: np.empty(spec.shape, jnp.dtype(dtype)),
        param_specs(config),
        is_leaf=lambda node: isinstance(node, ParamSpec),
    )
    targets = dict(leaves(params))
    for name, tensor in wanted.items():
        target = targets[tensor.path] if tensor.layer is None else targets[tensor.path][tensor.layer]
        target[...] = stored[name]
    return config, params


def load_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The shape of the model in a Hugging Face folder, from config.json alone. Raises as `load_params`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: not a Hugging Face model folder")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
        _refuse_unsupported(hf, path)
        rope = hf.get("rope_parameters") or {}
        return ModelConfig(
            vocab_size=hf["vocab_size"],
            dim=hf["hidden_size"],
            ffn_dim=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=hf["num_attention_heads"],
            num_kv_heads=hf["num_key_value_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            rope_base=float(rope["rope_theta"] if "rope_theta" in rope else hf["rope_theta"]),
            norm_eps=hf["rms_norm_eps"],
            tie_embeddings=hf.get("tie_word_embeddings", False),
            max_positions=hf["max_position_embeddings"],
        )
    except json.JSONDecodeError as error:
        raise UnsupportedCheckpointError(f"{path} is not JSON: {error}") from error
    except KeyError as error:
        raise UnsupportedCheckpointError(f"{path} has no key {error}") from error


def _refuse_unsupported(hf: Mapping[str, Any], path: Path) -> None:
    problems = [
        f"{key} = {hf.get(key)!r} (only {allowed[0]!r})" for key, allowed in _ONLY.items() if hf.get(key) not in allowed
    ]
    rope = hf.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        problems.append(f"rope_parameters.rope_type = {rope['rope_type']!r} (only 'default')")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"rope_parameters.partial_rotary_factor = {rope['partial_rotary_factor']} (only 1.0)")
    if other := set(hf.get("layer_types") or ()) - {"full_attention"}:
        problems.append(f"layer_types has {', '.join(sorted(other))} (only full_attention)")
    if problems:
        raise UnsupportedCheckpointError(f"{path}: this architecture does not cover {'; '.join(problems)}")


def _tensors(config: ModelConfig) -> dict[str, _Tensor]:
    """Every tensor of the Hugging Face model, by its name there."""
    found: dict[str, _Tensor] = {}
    for path, spec in leaves(param_specs(config)):
        if path in _TOP_NAMES:
            found[_TOP_NAMES[path]] = _Tensor(path, None, spec.shape)
            continue
        name = _LAYER_NAMES[path.removeprefix("layers/")]
        for layer in range(config.num_layers):
            found[f"model.layers.{layer}.{name}.weight"] = _Tensor(path, layer, spec.shape[1:])
    return found


def _checked_leaves(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Our leaves by path, on the host, after comparing them with what `config` says."""
    specs = dict(leaves(param_specs(config)))
    ours = dict(leaves(params))
    if missing := sorted(set(specs) - set(ours)):
        raise ValueError(f"the parameters lack {', '.join(missing)}")
    if extra := sorted(set(ours) - set(specs)):
        raise ValueError(f"Qwen3ForCausalLM has no place for the parameters {', '.join(extra)}")
    for path, leaf in ours.items():
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise ValueError(f"parameter {path} is a {type(leaf).__name__}: merge adapters or dequantise it first")
        if leaf.shape != specs[path].shape:
            raise ValueError(f"parameter {path} has shape {leaf.shape}, the configuration says {specs[path].shape}")
    return {path: np.asarray(leaf) for path, leaf in ours.items()}


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS_FILE).is_file():
        return [folder / _WEIGHTS_FILE]
    if (folder / _INDEX_FILE).is_file():
        names = json.loads((folder / _INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / Path(name).name for name in sorted(set(names))]
    raise FileNotFoundError(f"{folder} has neither {_WEIGHTS_FILE} nor {_INDEX_FILE} (.bin files are not read)")


def _check_tensors(stored: dict[str, np.ndarray], wanted: Mapping[str, _Tensor], *, tied: bool, folder: Path) -> None:
    head, embed = stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight")
    if tied and head is not None and embed is not None and np.array_equal(head, embed):
        del stored["lm_head.weight"]  # some tools write the tied table twice
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} has no place in this architecture" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        if stored[name].shape != wanted[name].shape:
            problems.append(f"{name} has shape {stored[name].shape}, config.json says {wanted[name].shape}")
        if stored[name].dtype.name not in _FLOATS:
            problems.append(f"{name} is {stored[name].dtype.name}, only {', '.join(_FLOATS)} are read")
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UnsupportedCheckpointError(f"{folder}: {shown}")


def _to_hf_config(config: ModelConfig, tokenizer: Tokenizer | None, *, dtype: str) -> dict[str, Any]:
    hf: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "rms_norm_eps": config.norm_eps,
        # Both spellings: transformers 5 reads rope_parameters, earlier ones and other tools rope_theta.
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        "dtype": dtype,
    }
    if tokenizer is not None:
        hf |= {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id, "bos_token_id": None}
    return hf


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"eos_token_id": [tokenizer.end_of_turn_id, tokenizer.eos_id], "pad_token_id": tokenizer.pad_id}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
