"""Dataset: files in, one value out, and nothing that is held out reaches training."""

import json
import logging

import pytest

from afm_rl.data.dataset import Dataset, from_files, hold_out
from afm_rl.data.split import conversation_key, is_held_out, stable_hash
from afm_rl.errors import UserError
from afm_rl.worlds.python_world import build_world


@pytest.fixture
def write(tmp_path):
    """Write records as JSON lines and return the path."""

    def run(name, rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return run


def test_stable_hash_is_the_same_everywhere():
    """The split must not change between processes or versions: a pinned value, and borders between parts count."""
    assert stable_hash("held-out", "text") == 0xFF6424CC913C72C1
    assert stable_hash("a", "b") != stable_hash("ab")


def test_is_held_out_share():
    """The share of held-out keys is the fraction, within 5 standard deviations; 0 and 1 are exact."""
    keys = [str(i) for i in range(10_000)]
    assert abs(sum(is_held_out(k, fraction=0.1, salt="s") for k in keys) - 1000) < 150
    assert not any(is_held_out(k, fraction=0.0, salt="s") for k in keys)
    assert all(is_held_out(k, fraction=1.0, salt="s") for k in keys)
    with pytest.raises(ValueError, match="between 0 and 1"):
        is_held_out("k", fraction=1.5, salt="s")


def test_hold_out_leaves_something_on_both_sides():
    """Small files keep a training and a held-out item; a single one is trained on."""
    for count in range(2, 12):
        items = [f"item {i}" for i in range(count)]
        for fraction in (0.01, 0.99):
            assert 0 < len(hold_out(items, str, fraction=fraction)) < count
    assert hold_out(["only"], str, fraction=0.1) == set() or is_held_out("only", fraction=0.1, salt="held-out")
    assert hold_out(["a", "b"], str, fraction=0.0) == set()


def test_split_prompts_do_not_leak(write, caplog):
    """Held-out prompts leave prompts, demonstrations and preferences, whatever their ids, with a warning."""
    asked = [{"prompt": f"question {i}", "checks": [{"type": "upper_case"}]} for i in range(200)]
    shown = [{"prompt": f"question {i}", "id": f"d{i}", "response": "YES"} for i in range(200)]
    compared = [{**row, "chosen": "A", "rejected": "b", "level": 1} for row in asked]
    with caplog.at_level(logging.WARNING):
        data = from_files(prompts=write("p", asked), demonstrations=write("d", shown), preferences=write("r", compared))
    held = {conversation_key(prompt) for prompt in data.eval_prompts}
    assert 5 < len(held) < 40
    for prompts in (
        data.prompts,
        [d.prompt for d in data.demonstrations],
        [p.prompt for p in data.preferences],
    ):
        assert len(prompts) == 200 - len(held)
        assert held.isdisjoint(map(conversation_key, prompts))
    assert f"demonstrations: {len(held)} of 200 records are held out" in caplog.text


def test_given_eval_file_is_the_split(write):
    """With a file for evaluation only what it holds leaves training."""
    asked = [{"prompt": f"question {i}"} for i in range(50)]
    data = from_files(prompts=write("p", asked), eval_prompts=write("e", [{"prompt": "question 7", "id": "other"}]))
    assert len(data.prompts) == 49
    assert [prompt.id for prompt in data.eval_prompts] == ["other"]


def test_feature_is_split_by_prompt(write):
    """All responses to one held-out feature prompt leave training together."""
    rows = [{"prompt": f"summarize {i // 2}", "response": f"r{i}"} for i in range(100)]
    data = from_files(feature_demonstrations=write("f", rows))
    assert len(data.feature_demonstrations) == 100 - 2 * len(data.feature_eval_prompts)
    assert data.feature_eval_prompts


def test_documents_split_by_content(tmp_path):
    """The side of a document is decided by its text, so copies never end up on both sides."""
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"document {i // 2}")
    data = from_files(documents={"web": tmp_path})
    assert set(data.documents["web"]).isdisjoint(data.heldout_documents["web"])
    assert len(data.documents["web"]) + len(data.heldout_documents["web"]) == 60
    assert data.heldout_documents["web"]


def test_mistakes(tmp_path):
    """No files at all and an unknown domain are errors that list what there is."""
    with pytest.raises(UserError, match="at least one of documents"):
        from_files()
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="unknown domain 'wbe'; the domains are web, code"):
        from_files(documents={"wbe": tmp_path})


def test_world_and_files_are_one_path(tmp_path):
    """The world written as a user's files reads back as the same dataset, record by record."""
    sizes = {"web_bytes": 30_000, "code_bytes": 30_000, "math_documents": 20, "long_context_documents": 5}
    counts = {"demonstrations": 200, "prompts": 60, "eval_prompts": 40, "preferences": 40}
    world = build_world(seed=3, **sizes, **counts, feature_demonstrations=30, feature_eval_prompts=10)
    back = from_files(**world.write_files(tmp_path))
    for name in Dataset.__dataclass_fields__:
        if name != "source":
            assert getattr(back, name) == getattr(world, name), name
