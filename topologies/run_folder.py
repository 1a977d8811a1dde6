"""A run is a folder: the resolved topology, the journal, and everything the stages write, each in its place.

`create_or_open` is how a launch gets its folder; it never mixes two runs. `open` is for looking at one (report, serve,
generate). A folder made for another topology is refused, naming the first key that differs; where it runs (launcher,
address, run_root) may change between a start and a resume, what is computed may not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afm_rl.errors import UserError
from topologies.journal import Journal, read_journal
from topologies.schema import Topology, load_topology
from topologies.yaml_source import Loc, show

#: Keys that say where a run happens; everything else says what it computes.
PLACE_KEYS = ("launcher", "address", "run_root")
_BEFORE_ANY_STAGE = ("topology.yaml", "topology.yaml.tmp", "journal.msgpack", "journal.msgpack.lock")
#: The record that ends a run's journal.
FINISHED = {"kind": "run finished"}


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run. `path` is absolute."""

    path: Path

    @classmethod
    def create_or_open(cls, root: str | Path, topology: Topology, *, resume: bool = False) -> RunFolder:
        """The folder `root`/NAME of a launch: made if it is new, opened if `resume` and it belongs to `topology`.

        With `resume` and no folder yet, the run starts from the beginning. Errors: `UserError` if the folder holds a
        run and `resume` is False, if it belongs to another topology, or if it is not a run folder.
        """
        run = cls(Path(root).absolute() / topology.name)
        if run._is_new():
            run.path.mkdir(parents=True, exist_ok=True)
            _write_atomically(run.topology_file, topology.to_yaml())
            return run
        if not run.topology_file.exists():
            raise UserError(f"{run.path} is not empty and not a run folder; choose another name or run_root")
        if not resume:
            raise UserError(run._exists_message())
        run._require_same(topology)
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run: its path, or its name below ./runs. Errors: `UserError` if there is none."""
        candidates = [Path(path), Path("runs") / path]
        for candidate in candidates:
            if (candidate / "topology.yaml").is_file():
                return cls(candidate.absolute())
        raise UserError(f"no run at {' or '.join(map(str, candidates))} (a run folder has a topology.yaml)")

    @property
    def topology_file(self) -> Path:
        return self.path / "topology.yaml"

    @property
    def journal_file(self) -> Path:
        return self.path / "journal.msgpack"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def policies(self) -> Path:
        return self.path / "policies"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def preferences(self) -> Path:
        return self.path / "preferences.sqlite"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics"

    @property
    def packages(self) -> Path:
        return self.path / "packages"

    @property
    def report_json(self) -> Path:
        return self.path / "report.json"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def topology(self) -> Topology:
        """The topology this folder was made for, resolved."""
        return load_topology(self.topology_file, check_files=False)

    @property
    def finished(self) -> bool:
        """Whether the launch that owns this folder got to its end."""
        return FINISHED in read_journal(self.journal_file)

    def open_journal(self) -> Journal:
        """The journal, for writing. Errors: as `Journal`, so `JournalLockedError` while a launch is running."""
        return Journal(self.journal_file)

    def mark_finished(self, journal: Journal) -> None:
        """Record that every stage is done; a second time changes nothing."""
        if FINISHED not in journal.records:
            journal.append(FINISHED)

    def policy_names(self) -> list[str]:
        """Names of the policies saved so far."""
        folders = self.policies.iterdir() if self.policies.is_dir() else ()
        return sorted(folder.name for folder in folders if _versions(folder))

    def policy(self, name: str, *, version: int | None = None) -> Path:
        """The Hugging Face folder of a policy, `policies/NAME/VERSION`; the newest version by default.

        Errors: `UserError` listing the policies, or the versions, that there are.
        """
        versions = _versions(self.policies / name) if name in self.policy_names() else {}
        if not versions:
            there = ", ".join(self.policy_names()) or "none yet"
            raise UserError(f"{self.path} has no policy '{name}'; it has: {there}")
        if version is not None and version not in versions:
            raise UserError(f"policy '{name}' has no version {version}; it has: {', '.join(map(str, sorted(versions)))}")
        return versions[max(versions) if version is None else version]

    def _is_new(self) -> bool:
        """Whether nothing is there, or only what a launch that failed before its first stage leaves.

        Such a launch (bad data, too few CPUs) has done nothing worth resuming, and its topology is the one to correct.
        """
        if not self.path.exists():
            return True
        if not self.path.is_dir():
            raise UserError(f"{self.path} is a file; choose another name or run_root")
        if any(child.name not in _BEFORE_ANY_STAGE for child in self.path.iterdir()):
            return False
        if not self.journal_file.exists():
            return True
        with self.open_journal() as journal:  # refused while a launch is at it
            return not journal.records

    def _exists_message(self) -> str:
        if self.finished:
            return (
                f"the run {self.path} is finished (see {self.report_html}); start another with --set name=NAME, "
                "or remove the folder"
            )
        return f"the run {self.path} is unfinished; continue it with --resume, or start another with --set name=NAME"

    def _require_same(self, topology: Topology) -> None:
        # The old file is read through the schema, so that an option new in this version is no difference.
        before, now = self.topology.resolved(), topology.resolved()
        for key in PLACE_KEYS:
            before.pop(key, None)
            now.pop(key, None)
        for loc, old, new in _differences(before, now, ()):
            raise UserError(
                f"{self.path} belongs to another topology: {show(loc)} was {old} and is now {new}; "
                "set it back to resume, or start another run with --set name=NAME"
            )


def _differences(before: Any, now: Any, loc: Loc) -> Iterator[tuple[Loc, str, str]]:
    """(place, old, new) of every leaf that differs, in the order of the file."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            missing = key not in before or key not in now
            if missing:
                yield (*loc, key), repr(before.get(key, "absent")), repr(now.get(key, "absent"))
            else:
                yield from _differences(before[key], now[key], (*loc, key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(old, new, (*loc, i))
    elif before != now or type(before) is not type(now):
        yield loc, repr(before), repr(now)


def _versions(folder: Path) -> dict[int, Path]:
    """Complete versions of one policy: folders with a number for a name and a model in them."""
    children = folder.iterdir() if folder.is_dir() else ()
    return {int(child.name): child for child in children if child.name.isdecimal() and (child / "config.json").exists()}


def _write_atomically(path: Path, text: str) -> None:
    """The whole file or none of it, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
