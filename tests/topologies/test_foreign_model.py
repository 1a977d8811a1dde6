"""Post-training someone else's model: a Hugging Face folder with its own tokenizer.json through every stage it can take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from afm_rl.config import ModelConfig
from afm_rl.huggingface import save_pretrained
from afm_rl.parameters import init_params
from afm_rl.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOPOLOGY = """
name: foreign
launcher: inline
model: {{huggingface: {folder}}}
checkpoints: {{steps: 1, iterations: 1}}
data:
  world: python
  sizes: {{code_bytes: 0, web_bytes: 0, math_documents: 0, long_context_documents: 0, demonstrations: 40, prompts: 20,
    eval_prompts: 8, preferences: 20, feature_demonstrations: 0, feature_eval_prompts: 0}}
stages:
  - sft: {{steps: 2, batch: 4, sequence_length: 512}}
  - reward_model: {{steps: 2, batch: 4, sequence_length: 512}}
  - itec:
      rounds: 1
      prompts_per_round: 4
      responses_per_prompt: 2
      rerank_prompts: 2
      max_tokens: 6
      reward: {{steps: 1, batch: 2, sequence_length: 512}}
      sft: {{steps: 1, batch: 2, sequence_length: 512}}
      rs: {{steps: 1, batch: 2, sequence_length: 512}}
      dpo: {{steps: 1, batch: 2, sequence_length: 512}}
      ipo: {{steps: 1, batch: 2, sequence_length: 512}}
      mdloo: {{iterations: 1, prompts: 2, responses: 2, max_tokens: 6}}
  - quantize: {{sensitivity_batches: 1}}
  - evaluate: {{prompts: 4, max_tokens: 6}}
  - serve: {{max_tokens: 6}}
"""


def test_a_foreign_model_goes_through_the_stages(foreign_tokenizer, tmp_path):
    """SFT, reward model, iTeC, quantisation, evaluation and serving run on its ids; what leaves has its tokenizer."""
    config = ModelConfig(832, 32, 64, 2, 2, 1, 16, max_positions=1024)
    tokenizer = Tokenizer.load(foreign_tokenizer)
    save_pretrained(init_params(config, jax.random.key(0)), tmp_path / "model", config=config, tokenizer=tokenizer)
    (tmp_path / "foreign.yaml").write_text(TOPOLOGY.format(folder=tmp_path / "model"))
    settings = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "topologies.cli", "launch", str(tmp_path / "foreign.yaml")]
    subprocess.run(command, check=True, timeout=600, env={**os.environ, **settings}, cwd=tmp_path)
    run = tmp_path / "runs" / "foreign"
    stages = [stage["name"] for stage in json.loads((run / "report.json").read_text())["stages"]]
    assert stages == ["sft", "reward_model", "itec", "quantize", "evaluate", "serve"]
    for folder in (run / "policies" / "sft" / "0", next((run / "packages").iterdir())):
        assert Tokenizer.load(folder).fingerprint == tokenizer.fingerprint
        assert (folder / "tokenizer.json").read_bytes() == (foreign_tokenizer / "tokenizer.json").read_bytes()
