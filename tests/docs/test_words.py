"""Plain technical English: phrases that make a reader stop are counted, in code and in pages."""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import pgtoolset
import pytest_pgtoolset

#: It reads the same files.
pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]

#: Persons in place of the field's nouns, inversions, archaisms.
PHRASES = re.compile(
    r"""
    \b(nobody|anybody|somebody|whoever|whomever|everybody|nothing\ else)\b
    | \bto\ be\ had\b | \b(is|are|was|were|be|been)\ told\b | \bhears?\ of\b | \bheard\ of\b
    | \bthose\ (who|that)\b | \bhe\ who\b | \bwho\ (is|are|was)\ in\ (the|its)\ way\b
    | \bfor\ ever\b | \banew\b | \bfarewell\b | \bhence\b | \bthereof\b | \bwhereof\b | \bupon\b
    | \bnone\ of\ (its|theirs|ours)\b | \b(is|are|has)\ (?-i:none)\b
    | \b(is|are)\ no\ (longer\ )?(error|matter|[a-z]+\ of)\b
    | \bwhat\ (is|was|it|they|he|nobody|somebody|stands|goes)\b
    | \bwhich\ is\ not\b | \bas\ it\ were\b | \bat\ the\ most\b | \bas\ long\ as\b
    | \bbeyond\ doubt\b | \bbe\ that\ as\b | \bthat\ one\b | \bby\ itself\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
WORD = re.compile(r"[A-Za-z][A-Za-z'-]+")


def prose_of(source: str) -> Iterator[str]:
    """The docstrings, comments and messages of a module: every string and comment with a space."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_text = token.type in (tokenize.STRING, tokenize.COMMENT)
        if (
            is_text or token.type == getattr(tokenize, "FSTRING_MIDDLE", -1)
        ) and " " in token.string:
            yield token.string


def pages(root: Path) -> Iterator[tuple[str, str]]:
    """Each module's prose, and each page without its blocks of code."""
    sources = [root / "src"]
    if not sources[0].exists():  # the suite on the installed wheel
        sources = [Path(package.__path__[0]) for package in (pgtoolset, pytest_pgtoolset)]
    for module in sorted(path for source in sources for path in source.rglob("*.py")):
        yield module.name, "\n".join(prose_of(module.read_text()))
    for page in sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md")]):
        yield (
            str(page.relative_to(root)),
            re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S),
        )


def rate(root: Path) -> tuple[float, list[str]]:
    """Phrases in 1,000 words, and each with its place."""
    words, found = 0, []
    for name, text in pages(root):
        flat = " ".join(text.split())
        words += len(WORD.findall(flat))
        found += [
            f"{name}: ...{flat[max(0, match.start() - 40) : match.end() + 30]}..."
            for match in PHRASES.finditer(flat)
        ]
    return 1000 * len(found) / words, found


def test_plain_english() -> None:
    """At most 0.6 such phrases in 1,000 words, as in structlog and psycopg."""
    per_thousand, found = rate(ROOT)
    assert per_thousand <= 0.6, "\n".join([f"{per_thousand:.1f} in 1,000 words", *found])


if __name__ == "__main__":
    per_thousand, found = rate(Path(sys.argv[1]))
    sys.stdout.write("\n".join([*found, f"{per_thousand:.1f} in 1,000 words", ""]))
