"""What the command line does with policies: answer a prompt, copy one in from a Hugging Face folder or out as one."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afm_rl.errors import UserError
from topologies.run_folder import RunFolder

if TYPE_CHECKING:  # JAX takes a second to import, which the other commands do not need
    from afm_rl.huggingface import CopiedCheckpoint


@dataclass(frozen=True)
class Answer:
    """One response; `finished` False: it was cut at the token limit."""

    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class ImportedPolicy:
    """What `import` made: `bytes` are the weights', `dtype` the embedding's."""

    folder: str
    parameters: int
    dtype: str
    bytes: int
    vocabulary: int
    tokenizer: str
    tokenizer_entries: int
    chat_template: bool


def generate_answers(
    run: RunFolder,
    policy: str,
    *,
    prompt: str,
    system: str | None = None,
    responses: int = 1,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Answer]:
    """Answers of a policy to one user turn. Temperature 0 is greedy.

    Errors: `UserError` if the run has no such policy, if the policy cannot be read or if the prompt does not fit it.
    """
    # JAX and the tokenizer take a second to import, which the other commands do not need.
    import numpy as np

    from afm_rl.generate import Generator
    from afm_rl.generation.options import EngineOptions
    from afm_rl.huggingface import load_params
    from afm_rl.tokenizer import Tokenizer
    from afm_rl.types import GenerationRequest, Message

    folder = run.policy(policy)
    try:
        tokenizer = Tokenizer.load(folder)
        config, params = load_params(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"the policy '{policy}' cannot answer prompts: {error}") from error
    messages = [Message("system", system)] if system is not None else []
    tokens = tokenizer.encode_chat([*messages, Message("user", prompt)])
    stop_ids = tokenizer.stop_ids
    generator = Generator(config, stop_ids=stop_ids, options=EngineOptions(max_batch=min(max(responses, 1), 256)))
    generator.load(params, policy=policy, version=0)
    request = GenerationRequest("prompt", np.asarray(tokens, np.int32), responses, max_tokens, temperature, seed)
    try:
        group = generator.generate([request])[0]
    except ValueError as error:
        raise UserError(str(error)) from error
    return [
        Answer(tokenizer.decode(ids.tolist()), len(ids), finished)
        for ids, finished in zip(group.responses, group.finished, strict=True)
    ]


def import_policy(source: str | Path, folder: str | Path, *, dtype: str | None = None) -> ImportedPolicy:
    """Check a Hugging Face folder and copy it, streamed, to `folder` as a policy, complete or not at all.

    `dtype` None keeps every tensor's own. Errors: `UserError` naming the key, tensor or file that is not covered, or if
    `folder` exists and is not an empty directory.
    """
    from afm_rl.huggingface import check_vocabulary, load_config
    from afm_rl.tokenizer import Tokenizer, has_tokenizer

    target = _free_target(folder)
    try:
        config = load_config(source)
        if not has_tokenizer(source):
            raise UserError(f"{source} has no tokenizer (tokenizer.json or tokenizer.model): a policy needs one")
        tokenizer = Tokenizer.load(source)
        check_vocabulary(tokenizer, config)
        with _replacing(target) as temporary:
            copied = _copy(source, temporary, tokenizer=tokenizer, dtype=dtype, label="importing tensors")
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    return ImportedPolicy(
        folder=str(target),
        parameters=config.num_params,
        dtype=copied.dtype,
        bytes=copied.weights_bytes,
        vocabulary=config.vocab_size,
        tokenizer=tokenizer.kind,
        tokenizer_entries=tokenizer.vocab_size,
        chat_template=tokenizer.chat_template is not None,
    )


def export_policy(
    run: RunFolder,
    policy: str,
    folder: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
) -> Path:
    """Copy a policy to `folder`, complete or not at all; returns its path.

    The files are copied as they are, or the weights written again where `dtype` or `max_shard_bytes` asks for it. Errors:
    `UserError` if the run has no such policy, if it is no model, or if `folder` exists and is not an empty directory.
    """
    source, target = run.policy(policy), _free_target(folder)
    with _replacing(target) as temporary:
        if dtype is None and max_shard_bytes is None:
            try:
                shutil.copytree(source, temporary)
            except shutil.Error as error:  # holds (from, to, why) of every file, but no errno
                file, _, why = error.args[0][0]
                raise UserError(f"{file} cannot be copied to {target}: {why}") from error
            return target
        from afm_rl.huggingface_files import MAX_SHARD_BYTES
        from afm_rl.tokenizer import Tokenizer, has_tokenizer

        others = [path.name for path in source.iterdir() if path.suffix == ".safetensors" and "model" not in path.name]
        if others:
            raise UserError(
                f"the policy '{policy}' holds {others[0]} beside the model: export it without --dtype and --max-shard-size"
            )
        tokenizer = Tokenizer.load(source) if has_tokenizer(source) else None
        limit = MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes
        _copy(source, temporary, tokenizer=tokenizer, dtype=dtype, max_shard_bytes=limit, label="exporting tensors")
    return target


def _copy(source: str | Path, folder: Path, *, label: str, **options: Any) -> CopiedCheckpoint:
    """`copy_pretrained` with a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from afm_rl.huggingface import copy_pretrained

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        return copy_pretrained(
            source, folder, on_tensor=lambda done, total: progress.update(task, completed=done, total=total), **options
        )


def _free_target(folder: str | Path) -> Path:
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists; give a folder that does not, or an empty one")
    return target


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A name beside `target` to write a folder under; it takes the target's place when the block ends well."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{target}: its folder cannot be made ({error.strerror}: {error.filename}); give another") from error
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        temporary.replace(target)  # an empty folder gives way
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
