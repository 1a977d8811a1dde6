"""What the command line does with the policies of a run: answer a prompt, copy one out as a Hugging Face folder."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from afm_rl.errors import UserError
from topologies.run_folder import RunFolder


@dataclass(frozen=True)
class Answer:
    """One response; `finished` False: it was cut at the token limit."""

    text: str
    tokens: int
    finished: bool


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
    generator = Generator(config, stop_ids=stop_ids, max_batch=max(1, responses))
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


def export_policy(run: RunFolder, policy: str, folder: str | Path) -> Path:
    """Copy a policy to `folder`, complete or not at all; returns its path.

    Errors: `UserError` if the run has no such policy, or if `folder` exists and is not an empty directory.
    """
    source, target = run.policy(policy), Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists; give a folder that does not, or an empty one")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        shutil.copytree(source, temporary)
        temporary.replace(target)  # an empty folder gives way
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
