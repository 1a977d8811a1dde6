"""config.json of a Hugging Face model: our shape from theirs, refusals by name, theirs from ours.

The architecture is the one they call Qwen3ForCausalLM. A configuration that asks for anything it does not compute
(scaled RoPE, sliding windows, biases, experts, quantised weights, another architecture) is refused by that name: loading
the weights all the same would give wrong numbers quietly. Where a key is absent, its default there (`Qwen3Config` of
transformers 5) is meant.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afm_rl.config import ModelConfig
from afm_rl.errors import UserError

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
ARCHITECTURE = "Qwen3ForCausalLM"

#: config.json keys that change the computation, and the only values of them that this architecture computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
}
#: What sets other architectures apart from this one.
_OTHER_ARCHITECTURES = {
    "llama": "Llama has no QK-norm",
    "mistral": "Mistral has no QK-norm and slides its window",
    "qwen2": "Qwen2 has no QK-norm and has biases on the query, key and value projections",
    "qwen2_moe": "a mixture of experts, without QK-norm",
    "qwen3_moe": "a mixture of experts, where this architecture is dense",
    "qwen3_next": "a mixture of experts with linear attention",
    "olmo2": "OLMo 2 normalises after the sublayers",
    "gemma2": "Gemma 2 caps its logits and slides its window",
    "gemma3_text": "Gemma 3 has norms after the sublayers and slides its window",
    "phi3": "Phi-3 has no QK-norm and fuses its projections",
}
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
_QUANTISED_KEYS = ("quantization_config", "compression_config")
_ROPE_KEYS = ("rope_scaling", "rope_parameters")


class UnsupportedCheckpointError(UserError, ValueError):
    """A Hugging Face folder that this architecture cannot hold, or whose parts contradict each other."""


class IncompleteCheckpointError(UserError, FileNotFoundError):
    """A Hugging Face folder that lacks a file."""


def load_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The shape of the model in a Hugging Face folder, from config.json alone.

    Raises IncompleteCheckpointError without a config.json, UnsupportedCheckpointError naming the key that is not covered.
    """
    path = Path(folder) / CONFIG_FILE
    hf = read_json(path)
    if problems := [*_other_architecture(hf), *_unsupported(hf)]:
        raise UnsupportedCheckpointError(f"{path}: this architecture does not cover {'; '.join(problems)}")
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    try:
        return ModelConfig(
            vocab_size=hf["vocab_size"],
            dim=hf["hidden_size"],
            ffn_dim=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=hf["num_attention_heads"],
            num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim", 128),
            rope_base=float(rope["rope_theta"] if "rope_theta" in rope else hf["rope_theta"]),
            norm_eps=float(hf["rms_norm_eps"]),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            max_positions=hf["max_position_embeddings"],
        )
    except KeyError as error:
        raise UnsupportedCheckpointError(f"{path} has no key {error}") from error
    except (TypeError, ValueError) as error:
        raise UnsupportedCheckpointError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder. Raises as `load_config`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise IncompleteCheckpointError(f"{path} does not exist: not a Hugging Face model folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnsupportedCheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedCheckpointError(f"{path} is not a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, on the disk and whole or not at all."""
    write_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file, on the disk and whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def to_hf_config(config: ModelConfig, *, dtype: str, ends: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a model of this shape; `ends` are the tokenizer's ids for padding and the end, where it has one."""
    return {
        "architectures": [ARCHITECTURE],
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
        **(ends or {}),
    }


def _other_architecture(hf: Mapping[str, Any]) -> list[str]:
    kind, classes = hf.get("model_type"), hf.get("architectures") or [ARCHITECTURE]
    if kind != "qwen3":
        why = f": {_OTHER_ARCHITECTURES[kind]}" if kind in _OTHER_ARCHITECTURES else ""
        return [f"model_type = {kind!r} (only 'qwen3'){why}"]
    return [] if classes == [ARCHITECTURE] else [f"architectures = {classes!r} (only {ARCHITECTURE!r})"]


def _unsupported(hf: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{key} = {hf.get(key)!r} (only {allowed[0]!r})" for key, allowed in _ONLY.items() if hf.get(key) not in allowed
    ]
    problems += [f"{key} = {hf[key]!r} (a mixture of experts; only dense)" for key in _EXPERT_KEYS if hf.get(key)]
    for key in _QUANTISED_KEYS:
        if quantised := hf.get(key):
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
            problems.append(f"{key} = {method or quantised!r} (quantised weights; only float ones)")
    for key in _ROPE_KEYS:
        problems += _scaled_rope(key, hf.get(key) or {})
    if other := set(hf.get("layer_types") or ()) - {"full_attention"}:
        problems.append(f"layer_types has {', '.join(sorted(other))} (only full_attention)")
    return problems


def _scaled_rope(key: str, rope: Any) -> list[str]:
    if not isinstance(rope, Mapping):
        return [f"{key} = {rope!r} (only an object)"]
    problems = []
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problems.append(f"{key}.rope_type = {kind!r} (only 'default')")
    elif unknown := sorted(set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}):
        problems.append(f"{key}.{unknown[0]} (RoPE is not scaled here)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"{key}.partial_rotary_factor = {rope['partial_rotary_factor']} (only 1.0)")
    return problems
