"""RUN/live.json as its readers know it: what a launch said last (`live.py` writes it), without Ray and JAX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: The file's name in a run folder, and the seconds between two writings of it.
FILE, EVERY_S = "live.json", 1.0


def read_live(run_path: Path) -> dict[str, Any] | None:
    """What the launch of a run folder said last; None where none ever said anything, or not legibly."""
    try:
        found = json.loads((run_path / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None
