"""TRL's side of `benchmarks/online_rl.py`: `RLOOTrainer` on Qwen3 in PyTorch, in an environment of its own.

    /path/to/torch/python benchmarks/peers/rloo_trl.py '{"model": FOLDER, "dtype": "float32", "cache": "static", ...}'

One update of the whole batch a step, no KL to a reference, no normalisation of advantages, completions of one length. A
step's seconds are split where TRL splits it: generation; rewards and the log-probabilities of the policy that sampled; the
update. A prompt is text there: a word a token.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import RLOOConfig, RLOOTrainer
from workload import Workload, make_prompts, serve_kinds, token_share


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Token i is the word "t<i>"; special tokens have names that no word begins with."""
    special = ("<pad>", "<end>", "<unknown>")
    names = [*special, *(f"t{i}" for i in range(len(special), vocab_size))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=special[2]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=special[0], eos_token=special[1], unk_token=special[2], padding_side="left"
    )


class Watch(TrainerCallback):
    """When each step began, generated, had its rewards and ended; ends the training at the reward that is asked for."""

    def __init__(self, until: float | None) -> None:
        self.until = until
        self.rewards: list[float] = []
        self.seconds: dict[str, list[float]] = {"generate": [], "collect": [], "step": []}
        self._began = 0.0

    def reward(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """What TRL calls; the mean is kept."""
        rewards = [token_share(ids) for ids in completion_ids]
        self.rewards.append(sum(rewards) / len(rewards))
        return rewards

    def timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """`method`, its seconds kept."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before = time.perf_counter()
            result = method(*args, **kwargs)
            self.seconds[name].append(time.perf_counter() - before)
            return result

        return run

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        self.seconds["step"].append(time.perf_counter() - self._began)
        if self.until is not None and self.rewards[-1] >= self.until:
            control.should_training_stop = True


def settings(folder: str, run: Workload, job: dict[str, Any]) -> RLOOConfig:
    """The update that `rloo` with one update and beta 0 takes."""
    sequences = run["prompts"] * run["responses"]
    return RLOOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=job["dtype"] == "bfloat16",
        seed=run["seed"],
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_steps=run["steps"],
        learning_rate=run["rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=run["clip"],
        per_device_train_batch_size=sequences,
        num_generations=run["responses"],
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        num_iterations=1,
        beta=0.0,
        normalize_advantages=False,
        max_completion_length=run["new_tokens"],
        generation_kwargs={"min_new_tokens": run["new_tokens"]},
        cache_implementation=None if job["cache"] == "dynamic" else job["cache"],
        gradient_checkpointing=False,
        dataloader_num_workers=0,
    )


def train(job: dict[str, Any], run: Workload) -> dict[str, Any]:
    """A training of a fresh policy; the seconds of every step and what they went to, and its mean reward."""
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    ids_PS = make_prompts({**run, "prompts": run["prompts"] * run["steps"]}, model.config.vocab_size)
    tokenizer = word_tokenizer(model.config.vocab_size)
    prompts = [" ".join(f"t{i}" for i in ids_S) for ids_S in ids_PS.tolist()]
    if tokenizer(prompts)["input_ids"] != ids_PS.tolist():
        raise RuntimeError("the tokenizer does not give the prompts' tokens back")
    watch = Watch(run.get("until"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = RLOOTrainer(
            model=model,
            reward_funcs=watch.reward,
            args=settings(folder, run, job),
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            callbacks=[watch],
        )
        trainer._generate_single_turn = watch.timed("generate", trainer._generate_single_turn)
        trainer._generate_and_score_completions = watch.timed("collect", trainer._generate_and_score_completions)
        trainer.train()
    step, collect, generate = (watch.seconds[name] for name in ("step", "collect", "generate"))
    return {
        "seconds": step,
        "rewards": watch.rewards,
        "generate": generate,
        "score": [whole - part for whole, part in zip(collect, generate, strict=True)],
        "train": [whole - part for whole, part in zip(step, collect, strict=True)],
    }


def main() -> None:
    """Answer requests to train."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])

    def quietly(run: Workload) -> dict[str, Any]:
        with redirect_stdout(sys.stderr):  # the trainer prints its summary
            return train(job, run)

    serve_kinds(train=quietly)


if __name__ == "__main__":
    main()
