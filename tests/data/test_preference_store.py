"""The preference store: batches come back as written, all of one or none, and writing twice changes nothing."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from afm_rl.data.preference_store import PreferenceStore
from afm_rl.types import Grades, Message, Preference, Prompt


def preference(name: str, level: int = 2) -> Preference:
    prompt = Prompt(name, (Message("user", f"Say {name} \u00e9."),), "format", ({"type": "contains", "text": name},))
    return Preference(prompt, f"{name}!", "no", level, Grades(2, 2, 2, 2), Grades(0, 1, 2, 2), "simulated-1", "simulated")


def test_batches_come_back_in_order(tmp_path: Path) -> None:
    """Guards every field, the order within and of the batches asked for, and a second process opening the file."""
    store = PreferenceStore(tmp_path / "deep" / "preferences.sqlite")
    first, second = [preference("a"), preference("b", 0)], [preference("c", 3)]
    store.add("round-1", first)
    store.add("round-2", second)
    again = PreferenceStore(store.path)
    assert again.read(["round-2", "round-1"]) == second + first
    assert again.read([]) == again.read(["round-3"]) == []


def test_a_batch_written_twice_is_there_once(tmp_path: Path) -> None:
    """Guards resume: a round that is annotated again replaces what it wrote."""
    store = PreferenceStore(tmp_path / "preferences.sqlite")
    store.add("round-1", [preference("a"), preference("b")])
    store.add("round-1", [preference("a"), preference("b")])
    assert [p.prompt.id for p in store.read(["round-1"])] == ["a", "b"]
    store.add("round-1", [preference("c")])
    assert [p.prompt.id for p in store.read(["round-1"])] == ["c"]


def test_a_failed_batch_leaves_the_old_one(tmp_path: Path) -> None:
    """Guards all or nothing: an error in mid-batch neither adds nor removes a record."""
    store = PreferenceStore(tmp_path / "preferences.sqlite")
    store.add("round-1", [preference("a")])
    broken = Preference(**{**vars(preference("b")), "source": None})
    with pytest.raises(sqlite3.IntegrityError):
        store.add("round-1", [preference("c"), broken])
    assert store.read(["round-1"]) == [preference("a")]
