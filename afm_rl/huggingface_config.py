"""config.json of a Hugging Face model: our shape from theirs, refusals by name, theirs from ours.

The architecture is the one they call Qwen3ForCausalLM. A configuration that asks for anything it does not compute
(scaled RoPE, sliding windows, biases, experts, quantised weights, another architecture) is refused by that name: loading
the weights all the same would give wrong numbers quietly. Where head_dim, tie_word_embeddings or a key that is only
checked is absent, its default there (`Qwen3Config` of transformers 5) is meant. model_type and every other key that gives
the model its shape must be there: what they assume without it (32 layers of width 4096, RoPE base 10,000) is not guessed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afm_rl.config import ModelConfig
from afm_rl.errors import UserError

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
ARCHITECTURE = "Qwen3ForCausalLM"

#: Their defaults of keys that may be absent.
_DEFAULTS = {"head_dim": 128, "tie_word_embeddings": False}
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
    """A Hugging Face folder that lacks a file, or whose file cannot be read."""


def load_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The shape of the model in a Hugging Face folder, from config.json alone.

    num_key_value_heads null means num_attention_heads, as there. Raises IncompleteCheckpointError without a config.json that
    can be read, UnsupportedCheckpointError naming the key that is absent, of another type or not covered.
    """
    path = Path(folder) / CONFIG_FILE
    hf = _DEFAULTS | read_json(path)
    if problems := [*_other_architecture(hf), *_unsupported(hf)]:
        raise UnsupportedCheckpointError(f"{path}: this architecture does not cover {'; '.join(problems)}")
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    try:
        return ModelConfig(
            vocab_size=_integer(hf, "vocab_size"),
            dim=_integer(hf, "hidden_size"),
            ffn_dim=_integer(hf, "intermediate_size"),
            num_layers=_integer(hf, "num_hidden_layers"),
            num_heads=_integer(hf, "num_attention_heads"),
            num_kv_heads=_integer(hf, "num_attention_heads" if hf["num_key_value_heads"] is None else "num_key_value_heads"),
            head_dim=_integer(hf, "head_dim"),
            rope_base=_number(hf | rope, "rope_theta"),
            norm_eps=_number(hf, "rms_norm_eps"),
            tie_embeddings=_flag(hf, "tie_word_embeddings"),
            max_positions=_integer(hf, "max_position_embeddings"),
        )
    except KeyError as error:
        raise UnsupportedCheckpointError(f"{path} has no key {error}; add it with the model's own value") from error
    except ValueError as error:
        raise UnsupportedCheckpointError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises IncompleteCheckpointError where there is no such file or it cannot be read, UnsupportedCheckpointError where it
    holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise IncompleteCheckpointError(f"{path} does not exist: not a Hugging Face model folder") from error
    except NotADirectoryError as error:
        raise IncompleteCheckpointError(f"{path.parent} is not a folder; give the folder that holds {path.name}") from error
    except IsADirectoryError as error:
        raise IncompleteCheckpointError(f"{path} is a folder, where a file belongs; put the model's own there") from error
    except PermissionError as error:
        raise IncompleteCheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
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


def _integer(hf: Mapping[str, Any], key: str) -> int:
    value = hf[key]
    if type(value) is not int or value < 1:  # bool is an int to isinstance
        raise ValueError(f"{key} must be an integer, at least 1, without quotes or a decimal point; it is {value!r}")
    return value


def _number(hf: Mapping[str, Any], key: str) -> float:
    value = hf[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{key} must be a number above 0, without quotes; it is {value!r}")
    return float(value)


def _flag(hf: Mapping[str, Any], key: str) -> bool:
    value = hf[key]
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, without quotes; it is {value!r}")
    return value


def _other_architecture(hf: Mapping[str, Any]) -> list[str]:
    kind, classes = hf.get("model_type"), hf.get("architectures") or [ARCHITECTURE]
    if kind != "qwen3":
        why = f": {_OTHER_ARCHITECTURES[kind]}" if isinstance(kind, str) and kind in _OTHER_ARCHITECTURES else ""
        return [f"model_type = {kind!r} (only 'qwen3'){why}"]
    return [] if classes in (ARCHITECTURE, [ARCHITECTURE]) else [f"architectures = {classes!r} (only {ARCHITECTURE!r})"]


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
    kinds = hf.get("layer_types")
    if not isinstance(kinds, list | None):
        problems.append(f"layer_types = {kinds!r} (only a list of 'full_attention')")
    elif other := {str(kind) for kind in kinds or () if kind != "full_attention"}:
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
