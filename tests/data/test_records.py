"""Records: what is written comes back, and every mistake is an error with file, line and fix."""

import json
import re
from pathlib import Path

import pytest

from afm_rl.data import records
from afm_rl.data.checks import CHECKS, validate_check
from afm_rl.data.documents import read_documents, write_documents
from afm_rl.errors import UserError
from afm_rl.types import Demonstration, Grades, Message, Preference, Prompt

GRADES = {"instruction_following": 2, "verbosity": 2, "truthfulness": 2, "harmlessness": 2}
PREFERENCE = {"prompt": "q", "chosen": "a", "rejected": "b", "level": 2, "chosen_grades": GRADES}


@pytest.fixture
def write(tmp_path):
    """Write lines (objects or raw text) to a file and return its path."""

    def run(*lines):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
        return path

    return run


def test_round_trip(tmp_path):
    """Writing and reading gives equal records, whatever the text: line separators, quotes, non-Latin letters."""
    text = 'line\nbreak "quoted" \u2028 \u00e9 \U0001f600 \x00'
    checks = ({"type": "answer", "value": "5"}, {"type": "json", "keys": ["a", "b"]})
    short = Prompt("one", (Message("user", text),), kind="k", checks=checks)
    long = Prompt("two", (Message("system", "s"), Message("user", text)))
    grades = Grades(0, 1, 2, 0)
    preference = Preference(short, text, "", 3, grades, Grades(1, 1, 1, 1), annotator="ann", source="human")
    records.write_prompts(tmp_path / "p", [short, long])
    records.write_demonstrations(tmp_path / "d", [Demonstration(long, text)])
    records.write_preferences(tmp_path / "r", [preference])
    assert records.read_prompts(tmp_path / "p") == [short, long]
    assert records.read_demonstrations(tmp_path / "d") == [Demonstration(long, text)]
    assert records.read_preferences(tmp_path / "r") == [preference]
    assert records.preference_from_json(records.preference_to_json(preference)) == preference


def test_defaults(write):
    """The shorthand needs only a prompt; its id depends on the text alone, so it survives reordering of the file."""
    first = records.read_prompts(write({"prompt": "a"}, "", {"prompt": "b"}))
    second = records.read_prompts(write({"messages": [{"role": "user", "content": "b"}]}, {"prompt": "a"}))
    assert first == second[::-1]
    assert first[0].kind == "general"
    assert first[0].messages == (Message("user", "a"),)


def test_level_names_and_computed_grades(write):
    """A level is a name or a number; grades that are not given follow from the prompt's checks."""
    computed = {"prompt": "q", "chosen": "5", "rejected": "6", "checks": [{"type": "answer", "value": "5"}]}
    path = write({**computed, "level": "significantly"}, {**PREFERENCE, "rejected_grades": GRADES})
    by_checks, by_hand = records.read_preferences(path)
    assert (by_checks.level, by_hand.level) == (3, 2)
    assert (by_checks.chosen_grades.truthfulness, by_checks.rejected_grades.truthfulness) == (2, 0)
    assert (by_hand.annotator, by_hand.source) == ("unknown", "file")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"promt": "q"}, "unknown key 'promt'; did you mean 'prompt'"),
        ({"prompt": "q", "zzz": 1}, "unknown key 'zzz'; the keys are id, prompt"),
        ({"kind": "x"}, 'either "prompt"'),
        ({"prompt": "q", "messages": []}, 'either "prompt"'),
        ({"prompt": 5}, "'prompt' must be a text"),
        ({"prompt": "  "}, "'prompt' must be a text"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] must be"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "one of system, user, assistant"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "last message must be the user's"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
            "can only be the first one",
        ),
        ({"prompt": "q", "checks": {"type": "refuse"}}, "'checks' must be a list"),
        ({"prompt": "q", "checks": [{"type": "refuze"}]}, "did you mean 'refuse'"),
        ({"prompt": "q", "id": 7}, "'id' must be a text"),
        ('{"prompt": "q", "prompt": "r"}', "'prompt' is given twice"),
        ('{"prompt": "q"', "not JSON"),
        ('["q"]', "expected a JSON object, got list"),
    ],
)
def test_prompt_mistakes_name_the_line(write, line, message):
    """Every kind of mistake in a prompt names file and line."""
    path = write({"prompt": "fine"}, line)
    with pytest.raises(UserError, match=message) as error:
        records.read_prompts(path)
    assert str(error.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": "much"}, "'level' says"),
        ({"level": 4}, "'level' says"),
        ({"level": True}, "'level' says"),
        ({"chosen": None}, "'chosen' must be a text"),
        ({"rejected": "a"}, "prefers nothing"),
        ({}, "'rejected_grades' is missing and the prompt has no checks"),
        ({"rejected_grades": {**GRADES, "verbosity": 3}}, "rejected_grades.verbosity must be 0, 1 or 2"),
        ({"rejected_grades": {"verbosity": 1}}, "exactly the keys instruction_following"),
    ],
)
def test_preference_mistakes(write, change, message):
    """A preference without a level, with a grade out of range or with nothing to prefer is refused."""
    with pytest.raises(UserError, match=message):
        records.read_preferences(write({**PREFERENCE, **change}))


def test_the_documented_examples_are_valid(write):
    """Every example of docs/data.md reads as what its heading says, and every check it lists exists and is listed."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    readers = {
        "Prompts": records.read_prompts,
        "Demonstrations": records.read_demonstrations,
        "Preferences": records.read_preferences,
    }
    for heading, read in readers.items():
        (block,) = re.findall(rf"^## {heading}$.*?^```json\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
        assert read(write(block.strip()))
    for example in re.findall(r'`(\{"type".*?\})`', page):
        validate_check(json.loads(example))
    assert all(f'"{name}"' in page or f"`{name}`" in page for name in CHECKS)


def test_the_same_prompt_twice(write):
    """Prompt ids are what the online loop accounts by: a repeated one names both lines. Demonstrations may repeat."""
    with pytest.raises(UserError, match=r":3: the same prompt or id .* as on line 1"):
        records.read_prompts(write({"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}))
    twice = {"prompt": "a", "response": "x"}
    assert len(records.read_demonstrations(write(twice, twice))) == 2


def test_files_that_cannot_be_read(tmp_path):
    """No file, no records and no UTF-8 are the user's errors, each with the path; a byte order mark is none."""
    with pytest.raises(UserError, match="no such file"):
        records.read_prompts(tmp_path / "absent.jsonl")
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n\n")
    with pytest.raises(UserError, match="no records"):
        records.read_prompts(path)
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:2: not UTF-8"):
        records.read_prompts(path)
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n')
    assert records.read_prompts(path)[0].messages[0].content == "a"


def test_documents(tmp_path):
    """Folders are read recursively in the order of paths, line ends kept; other and blank files are left out."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.py").write_bytes(b"a\r\nb")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.md").write_text("  \n")
    (tmp_path / "d.bin").write_bytes(b"\xff")
    write_documents(tmp_path / "e.jsonl", ["third\u2028", "fourth"])
    assert read_documents(tmp_path) == ["first", "a\r\nb", "third\u2028", "fourth"]
    assert read_documents(tmp_path / "a.txt") == ["first"]


def test_document_mistakes(tmp_path):
    """What is no document names its file, and its line where it has lines."""
    (tmp_path / "x.jsonl").write_text('{"text": "a", "url": "u"}\n{"txt": "b"}\n')
    (tmp_path / "x.bin").write_text("a")
    (tmp_path / "x.txt").write_bytes(b"a\xff")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("x.jsonl", r'x.jsonl:2: "text" must be'),
        ("x.bin", "cannot read .bin"),
        ("x.txt", "not UTF-8 at byte 1"),
        ("empty", "no documents in it"),
        ("absent", "no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            read_documents(tmp_path / name)
