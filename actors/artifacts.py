"""What a folder of a run holds, whichever kind it is: a policy, a reward model, an adapter or a palettized package.

Policies are Hugging Face folders; a reward model is one with `heads.safetensors` beside it; an adapter is in PEFT's
layout; a package has a manifest. Each is written under a temporary name and renamed, so that a folder that exists is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from afm_rl.config import ModelConfig
from afm_rl.huggingface import load_params, save_pretrained
from afm_rl.safetensors_file import read_safetensors, write_safetensors
from afm_rl.tokenizer import Tokenizer
from afm_rl.weights import leaves, nest
from quant.package import is_package, read_adapter, read_package, write_adapter

HEADS_FILE = "heads.safetensors"


#: How the model of a policy folder is read: (its shape, its parameters).
LoadPolicy = Callable[[Path], tuple[ModelConfig, Any]]


class AdapterShape(Protocol):
    """Rank and alpha of a LoRA adapter."""

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float: ...


@dataclass(frozen=True)
class Artifact:
    """Parameters, NumPy unless read otherwise (a reward model: {"trunk", "heads"}); the shape; an adapter's rank, alpha."""

    params: Any
    config: ModelConfig | None
    adapter: AdapterShape | None = None


def load_artifact(folder: str | Path, *, load_policy: LoadPolicy = load_params) -> Artifact:
    """Read a folder by what it holds, the model of a policy by `load_policy`.

    Raises FileNotFoundError or ValueError naming the file.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        adapter = read_adapter(folder)
        return Artifact(adapter.params, None, adapter)
    if is_package(folder):
        package = read_package(folder)
        return Artifact(package.params, package.config)
    config, params = load_policy(folder)
    if (folder / HEADS_FILE).exists():
        return Artifact({"trunk": params, "heads": nest(read_safetensors(folder / HEADS_FILE))}, config)
    return Artifact(params, config)


def save_artifact(
    folder: Path,
    params: Any,
    config: ModelConfig,
    *,
    adapter: AdapterShape | None = None,
    tokenizer_folder: str | None = None,
) -> None:
    """Write a policy, a reward model (params with "heads") or, given `adapter`, an adapter; replaces what is there."""
    if adapter is not None:
        _replace(folder, lambda at: write_adapter(at, params, rank=adapter.rank, alpha=adapter.alpha))
        return
    tokenizer = Tokenizer.load(Path(tokenizer_folder)) if tokenizer_folder else None

    def write(at: Path) -> None:
        trunk = params["trunk"] if "heads" in params else params
        save_pretrained(trunk, at, config=config, tokenizer=tokenizer)
        if "heads" in params:
            write_safetensors(at / HEADS_FILE, dict(leaves(params["heads"])))

    _replace(folder, write)


def _replace(folder: Path, write: Callable[[Path], None]) -> None:
    """Write beside the folder, then swap: a kill leaves the old folder, none, or the new one, never half of one."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
