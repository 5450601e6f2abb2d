"""Results as files: what was committed, and what a run has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parent.parent

#: The results that are committed, and what they are shown with.
COMMITTED = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "images" / "bench"

#: By module: `environment`, `measures`, `curves`.
Results: TypeAlias = dict[str, dict[str, Any]]


class ResultsError(Exception):
    """A file of results cannot be read; the message names it and says what is wrong."""


def load(path: Path) -> Results:
    """Return the results of a file; none where there is no file.

    Raises:
        ResultsError: the file is not one of results.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        results = json.loads(text)
    except ValueError as error:
        raise ResultsError(f"{path}: not JSON: {error}") from error
    if not isinstance(results, dict):
        raise ResultsError(f"{path}: an object of modules is expected")
    for name, module in results.items():
        parts = {"environment", "measures", "curves"}
        if not isinstance(module, dict) or not all(
            isinstance(module.get(part), dict) for part in parts
        ):
            raise ResultsError(f"{path}: {name} lacks one of {', '.join(sorted(parts))}")
    return results


def save(path: Path, results: Results) -> None:
    """Write results so that a change of one figure changes one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    draft.replace(path)
