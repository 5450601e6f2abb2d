"""`_arguments.transactions`: the options of a transaction, and counts and functions."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from pgtoolset._arguments import (
    NO_OPTIONS,
    TransactionOptions,
    check_count,
    check_function,
)

URL = "postgresql+asyncpg://user:secret@host/database"


@pytest.mark.parametrize(
    ("options", "execution_options", "remaining", "modes"),
    [
        ({}, {}, [], []),
        ({"durable": True}, {}, [], []),
        ({"resolve_commit": 5}, {}, [], []),
        (
            {"isolation_level": "SERIALIZABLE"},
            {"isolation_level": "SERIALIZABLE"},
            [],
            ["ISOLATION LEVEL SERIALIZABLE"],
        ),
        ({"read_only": True}, {"postgresql_readonly": True}, [], ["READ ONLY"]),
        ({"read_only": False}, {"postgresql_readonly": False}, ["READ WRITE"], ["READ WRITE"]),
        (
            {"deferrable": False, "read_only": True},
            {"postgresql_readonly": True, "postgresql_deferrable": False},
            ["NOT DEFERRABLE"],
            ["READ ONLY", "NOT DEFERRABLE"],
        ),
    ],
)
def test_options(
    options: dict[str, Any],
    execution_options: dict[str, Any],
    remaining: list[str],
    modes: list[str],
) -> None:
    """Each option goes into the BEGIN, or into a SET TRANSACTION where the driver has no word for
    it; on a bound connection all go there."""
    checked = TransactionOptions(**options)
    assert checked.execution_options() == execution_options
    assert checked.remaining_modes() == remaining
    assert checked.modes() == modes
    assert set(checked.names()) == set(options)
    assert (checked == NO_OPTIONS) == (not options)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), (5, 5.0), (0.5, 0.5), ("500ms", 0.5), (timedelta(minutes=1), 60.0)],
)
def test_resolve_commit(given: Any, expected: float | None) -> None:
    """The time in which a commit is resolved has every form of a time."""
    assert TransactionOptions(resolve_commit=given).resolve_seconds == expected


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("isolation_level", "SNAPSHOT", ValueError),
        ("isolation_level", "read committed", ValueError),
        ("isolation_level", URL, ValueError),
        ("isolation_level", b"SERIALIZABLE", TypeError),
        ("isolation_level", ["SERIALIZABLE"], TypeError),
        *(
            (name, value, TypeError)
            for name in ("durable", "read_only", "deferrable")
            for value in (0, "yes", [], URL)
        ),
        ("durable", None, TypeError),
        ("resolve_commit", 0, ValueError),
        ("resolve_commit", -1, ValueError),
        ("resolve_commit", URL, ValueError),
        ("resolve_commit", True, TypeError),
        ("resolve_commit", [5], TypeError),
    ],
)
def test_wrong_option(name: str, value: Any, error: type[Exception]) -> None:
    """A wrong option is refused by its name, and no URL is shown."""
    with pytest.raises(error, match=f"^{name} must be") as caught:
        TransactionOptions(**{name: value})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-3, ValueError), (True, TypeError), (1.0, TypeError), (URL, TypeError)],
)
def test_count(value: Any, error: type[Exception]) -> None:
    """A count is an int of at least 1."""
    check_count("attempts", 1)
    with pytest.raises(error, match=r"^attempts must be") as caught:
        check_count("attempts", value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 3, URL, object()])
def test_function(value: Any) -> None:
    """What cannot be called is no function."""
    check_function("work", "a function", print)
    with pytest.raises(TypeError, match=r"^work must be a function, not") as caught:
        check_function("work", "a function", value)
    assert "secret" not in str(caught.value)
