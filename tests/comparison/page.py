"""The tables of docs/comparison.md, read."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "comparison.md").read_text()
ROW = re.compile(r"^\| (?P<title>[^|]+?) \|(?P<cells>.*)\|$", re.MULTILINE)


def table() -> dict[str, dict[str, str]]:
    """The cells of the page, by title and heading."""
    rows: dict[str, dict[str, str]] = {}
    headings: list[str] = []
    for row in ROW.finditer(PAGE):
        cells = [cell.strip() for cell in row["cells"].split("|")]
        if row["title"] == "promise":
            headings = cells
        elif headings and not row["title"].startswith("---") and len(cells) == len(headings):
            assert row["title"] not in rows, row["title"]
            rows[row["title"]] = dict(zip(headings, cells, strict=True))
    return rows


CELLS = table()

#: What a cell begins with, and what it says about the program.
WORDS = {"yes": True, "no": False, "-": None}


def word_of(cell: str) -> bool | None:
    """What a cell says: its first word; a remark may follow after a comma."""
    return WORDS[cell.partition(",")[0]]
