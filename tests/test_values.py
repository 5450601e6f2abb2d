"""Values of the contracts: modes that are made of a text, and sessions described in words."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from datetime import timedelta
from typing import Any

import pytest

from pgtoolset import Blocker, LockMode, RowChange, RowLockMode

SEEN = Blocker(7, "shop", "idle in transaction", "SELECT 1", timedelta(seconds=90))


@pytest.mark.parametrize(
    ("blocker", "words"),
    [
        (SEEN, "pid 7 ('shop'), idle in transaction, 90.0 s in its transaction, query: SELECT 1"),
        (
            replace(SEEN, application_name="", transaction_age=None, state="active"),
            "pid 7, active, query: SELECT 1",
        ),
        (replace(SEEN, state=None), "pid 7 ('shop'), no state, 90.0 s in its transaction, query: "),
        (
            replace(SEEN, query=None, transaction_age=None),
            "pid 7 ('shop'), idle in transaction, query: ",
        ),
        (
            Blocker(7, None, None, None, None),
            "pid 7, which has ended, or of which this role may not see more (GRANT pg_read_all_",
        ),
        (Blocker(0, None, None, None, None), "a prepared transaction (see pg_prepared_xacts)"),
    ],
)
def test_a_blocker_in_words(blocker: Blocker, words: str) -> None:
    """A blocker says which session it is, what it does and for how long, where that is known."""
    assert str(blocker).startswith(words)


def test_a_blocker_is_one_line() -> None:
    """What another session has written is shown as one line, without control characters, cut."""
    text = str(
        replace(SEEN, application_name="\x1b[2J", query="SELECT\n\x1b[2J\x00\u202e " + "x" * 300)
    )
    assert r"query: SELECT \x1b[2J\x00\u202e xxx" in text
    assert text.isprintable()
    assert text.endswith("x...")
    assert len(text) < 350


@pytest.mark.parametrize("mode", [*LockMode, *RowLockMode])
def test_a_mode_of_a_text(mode: LockMode | RowLockMode) -> None:
    """A mode is made of its value or its name, in any case."""
    modes: Any = type(mode)
    for text in (mode.value, mode.name):
        for spelling in (text, text.lower(), text.title()):
            assert modes(spelling) is mode


@pytest.mark.parametrize("text", ["", "SHARED", "ROW  SHARE", None, 5])
def test_no_mode_of_another_text(text: Any) -> None:
    """Another text is a ValueError, and so is everything that is not a text."""
    for modes in (LockMode, RowLockMode):
        with pytest.raises(ValueError, match="is not a valid"):
            modes(text)


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [(None, {"a": 1}, "insert"), ({"a": 1}, {"a": 2}, "update"), ({"a": 1}, None, "delete")],
)
def test_the_kind_of_a_change(
    before: dict[str, Any] | None, after: dict[str, Any] | None, kind: str
) -> None:
    """A change knows its kind by the states before and after it, and cannot be changed itself."""
    change = RowChange(int, 1, before, after)
    assert change.kind == kind
    with pytest.raises(FrozenInstanceError):
        change.pk = 2  # type: ignore[misc]
