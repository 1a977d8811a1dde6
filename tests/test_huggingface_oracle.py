"""Their checkpoint, their numbers: losses, gradients of every kind of parameter and greedy tokens of transformers.

The fixture has a left-padded row; here that row is given by its real tokens alone, padded on the right, which is the same
sequence to a causal model.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afm_rl.generate import Generator
from afm_rl.generation.options import EngineOptions
from afm_rl.huggingface import load_pretrained
from afm_rl.huggingface_files import places
from afm_rl.policy_losses import supervised
from afm_rl.types import GenerationRequest
from afm_rl.weights import leaves

FIXTURES = Path(__file__).parent / "fixtures"
PADDING = 7


@pytest.fixture(scope="module")
def oracle():
    return np.load(FIXTURES / "qwen3_tiny_forward.npz")


@pytest.fixture(scope="module")
def model():
    return load_pretrained(FIXTURES / "qwen3_tiny")


@pytest.fixture(scope="module")
def loss_and_grads(oracle, model):
    """Token-mean cross-entropy of both rows and its gradient, by the Hugging Face name of each tensor."""
    ids = oracle["input_ids"]
    tokens_BT = np.stack([ids[0], np.concatenate([ids[1, PADDING:], np.zeros(PADDING, ids.dtype)])]).astype(np.int32)
    mask_BT = np.ones(tokens_BT.shape, np.float32)
    mask_BT[:, 0] = 0
    mask_BT[1, -PADDING:] = 0
    assert mask_BT.sum() == oracle["token_valid"].sum()

    def loss(params):
        batch = {"tokens_BT": tokens_BT, "mask_BT": mask_BT}
        return supervised(model.config)(params, {}, batch, jax.random.key(0))[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(model.params)
    ours = dict(leaves(grads))
    named = {
        name: np.asarray(ours[place.path] if place.layer is None else ours[place.path][place.layer])
        for name, place in places(model.config).items()
    }
    return float(value), named


def test_loss(oracle, loss_and_grads):
    """The loss that transformers computed, padding left out."""
    assert loss_and_grads[0] == pytest.approx(float(oracle["loss_f64"]), abs=1e-5)


def test_gradients(oracle, loss_and_grads):
    """Every gradient of theirs under its own name: a transposed or swapped tensor would show here first."""
    names = [key for key in oracle.files if key.startswith("grad/")]
    assert len(names) == 11
    for key in names:
        found, expected = loss_and_grads[1][key.removeprefix("grad/")], oracle[key]
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=1e-3, err_msg=key)


def test_embedding_gradient_and_norm(oracle, loss_and_grads):
    """The tied table's gradient (input and output use together) and the norm over all parameters."""
    embed = loss_and_grads[1]["model.embed_tokens.weight"].astype(np.float64)
    rows = oracle["embed_grad_rows"]
    found = embed[oracle["input_ids"][0, : len(rows)]]  # the rows of the first tokens
    np.testing.assert_allclose(found, rows, atol=1e-4 * np.abs(rows).max())
    assert np.square(embed).sum() == pytest.approx(float(oracle["embed_grad_sumsq"]), rel=1e-4)
    norm = np.sqrt(sum(np.square(grad.astype(np.float64)).sum() for grad in loss_and_grads[1].values()))
    assert norm == pytest.approx(float(oracle["total_grad_norm"]), rel=1e-4)


def test_greedy_tokens(oracle, model):
    """What they generate greedily, token by token, through our cache."""
    generator = Generator(model.config, stop_ids=(1,), options=EngineOptions(max_batch=2))
    generator.load(jax.tree.map(jnp.array, model.params), policy="p", version=0)
    prompts = [oracle["input_ids"][0], oracle["input_ids"][1, PADDING:]]
    new = oracle["greedy_ids"][:, oracle["input_ids"].shape[1] :]
    requests = [
        GenerationRequest(str(i), prompt.astype(np.int32), 1, new.shape[1], 0.0, 0) for i, prompt in enumerate(prompts)
    ]
    for group, expected in zip(generator.generate(requests), new, strict=True):
        response = group.responses[0]
        assert response.tolist() == expected[: len(response)].tolist()
        assert len(response) == len(expected) or response[-1] == 1
