"""`_arguments.shown`: what an error message shows of a value that a caller gave."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest
from sqlalchemy import make_url

from pgtoolset._arguments import shown
from tests.support import Item

SECRET = "postgresql+asyncpg://user:secret@host/database"


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("the repr was used")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("text", "'text'"),
        (5, "5"),
        (None, "None"),
        (int, "int"),
        (Item, "Item"),
        ((1, "a"), "(1, 'a')"),
        ([1] * 9, "[1, 1, 1, 1, 1, ...]"),
        (object(), "an object"),
        ({"a": 1}, "a dict"),
        ("\x1b]0;title\x07", r"'\x1b]0;title\x07'"),
    ],
)
def test_shown(value: Any, expected: str) -> None:
    """Plain values are shown as Python writes them, others by their type."""
    assert shown(value) == expected


class Setting(Enum):
    URL = SECRET


class Text(str):
    def __repr__(self) -> str:
        return SECRET


@pytest.mark.parametrize(
    "value",
    [
        SECRET,
        make_url(SECRET),
        [SECRET],
        (1, (SECRET,)),
        {SECRET: 1},
        Setting.URL,
        Text("text"),
        type(SECRET, (), {}),
        type(SECRET, (), {})(),
        SECRET.encode(),
        "user:secret@host/database",
        "postgresql//user:secret@host",
        "host=h password=secret",
        "host=h password = 's secret'",
        "postgresql%3A%2F%2Fuser%3Asecret%40host",
        "x" * 100 + SECRET,
    ],
)
def test_no_secret(value: Any) -> None:
    """A URL or a DSN is never shown, wherever it is and however it is written."""
    assert "secret" not in shown(value)


def test_short_and_safe() -> None:
    """A long value is cut, and the `repr` of a class of the caller's is not called."""
    assert len(shown("x" * 1000)) <= 80
    assert len(shown(10**200)) <= 80
    assert shown(Hostile()) == "a Hostile"


def test_endless() -> None:
    """A list that holds itself is shown to a depth."""
    endless: list[Any] = []
    endless.append(endless)
    assert shown(endless) == "[[[a list]]]"


def test_an_instance_is_not_loaded() -> None:
    """A mapped instance is named by its class: its `repr` might read expired attributes."""
    assert shown(Item(id=1)) == "an Item"
