"""The files that the how-tos show, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "howto"
PAGES = sorted(FOLDER.glob("*.md"))

#: A file that a how-to shows. Its first line is its name.
_FILE = re.compile(r"^```(?:py|ini)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def write_files(page: str, folder: Path) -> dict[str, str]:
    """Write the files of a how-to to a folder, and return them by name."""
    files = dict(_FILE.findall((FOLDER / page).read_text()))
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return files
