"""Settings are checked before any SQL, and no message, repr or name shows a value."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from pgtoolset import (
    SettingMissingError,
    TransactionStateError,
    create_db_context,
    create_db_dependency,
    get_transaction,
    run_transaction,
)
from pgtoolset._arguments import Settings, SettingsSource, check_settings

nowhere = async_sessionmaker(create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:9/x"))

#: A value that no part of a message could have by chance.
MARK = "the\u2603secret"


class Tenant(str, Enum):  # noqa: UP042 - of that kind
    """A string of Python's other kind."""

    A = "a"


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.text().map(lambda each: MARK + each),
    st.text().map(lambda each: each + MARK + "\0"),
    st.binary().map(lambda each: MARK.encode() + each),
    st.just([MARK]),
    st.just({"key": MARK}),
    st.just(object()),
    st.just(UUID(int=7)),
    st.just(Decimal("7.5")),
    st.just(None),
    st.floats(),
    st.timedeltas(),
)
NAMES = st.one_of(
    st.sampled_from(["app.key", "search_path", "App.Key", "role"]), st.text(max_size=70)
)


@given(settings=st.dictionaries(NAMES, VALUES, max_size=4))
def test_no_message_shows_a_value(settings: dict[Any, Any]) -> None:
    """Whatever is wrong, the error names the setting and never its value; so does a repr."""
    try:
        checked = check_settings(settings)
    except (TypeError, ValueError) as error:
        assert MARK not in str(error)
        assert "settings" in str(error)
        assert error.__cause__ is None
    else:
        assert MARK not in repr(checked)


@given(st.dictionaries(st.sampled_from(["app.a", "app.b", "B.c"]), st.text(), max_size=3))
def test_good_settings(settings: dict[str, str]) -> None:
    """Every text but one with NUL, or with half of a pair of surrogates, is a value."""
    is_bad = any("\0" in each or _is_broken(each) for each in settings.values())
    if is_bad:
        with pytest.raises(ValueError, match=r"NUL|Unicode"):
            check_settings(settings)
    else:
        assert check_settings(settings).values == {
            name.lower(): value for name, value in settings.items()
        }


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Tenant.A, "a"),
        (True, "on"),
        (False, "off"),
        (7, "7"),
        (-1, "-1"),
        (0.5, "0.5"),
        (timedelta(seconds=2), "2000ms"),
        (timedelta(microseconds=1), "1us"),
        (timedelta(), "0ms"),
        (timedelta(days=1), "86400000ms"),
    ],
)
def test_values(value: Any, expected: str) -> None:
    """Each type has one spelling."""
    assert check_settings({"app.key": value}).values == {"app.key": expected}


BAD_NAMES = ["", "a b", "a.", ".a", "a..b", "a;b", 'a"b', "a\n", "1a", "\u00e9", "a-b", "x" * 64]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(name: str) -> None:
    """A name that PostgreSQL could not have is refused, in settings and in require."""
    with pytest.raises(ValueError, match="settings"):
        check_settings({name: MARK})
    with pytest.raises(ValueError, match="require"):
        SettingsSource({}, [name])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "settings": lambda: MARK,
    "value": lambda: {"app.key": [MARK]},
    "none": lambda: None,
    "awaitable": lambda: _later(),
    "list": lambda: [("app.key", MARK)],
}


async def _later() -> dict[str, str]:
    return {"app.key": MARK}


@pytest.mark.parametrize("wrong", FUNCTIONS)
async def test_what_a_function_returns(wrong: str) -> None:
    """What a function returns is checked like a mapping, before any SQL and in each place."""
    function = FUNCTIONS[wrong]

    async def work(session: AsyncSession) -> None:
        raise AssertionError("the work has begun")

    async def context() -> None:
        async with create_db_context(nowhere, settings=function)():
            raise AssertionError("the block has begun")

    async def dependency() -> None:
        async for _ in create_db_dependency(nowhere, settings=function)():
            raise AssertionError("the block has begun")

    async def block() -> None:
        async with nowhere() as session, get_transaction(session, settings=function):
            raise AssertionError("the block has begun")

    async def run() -> None:
        await run_transaction(nowhere, work, settings=function)

    for place in (context, dependency, block, run):
        with pytest.raises((TypeError, ValueError), match="settings") as caught:
            await place()
        assert MARK not in str(caught.value)


async def test_functions_that_cannot_be_called() -> None:
    """A function with parameters, or an async one, is refused where FastAPI does not call it."""
    for function in (_later, lambda each: {}):
        with pytest.raises(TypeError, match="settings must be a"):
            create_db_context(nowhere, settings=function)  # type: ignore[arg-type]


def test_errors_of_the_caller() -> None:
    """An error of the caller's function passes as it is."""
    with pytest.raises(ZeroDivisionError):
        SettingsSource(lambda: {"app.key": 1 // 0}).now()


def test_missing_names() -> None:
    """The error has the names that are missing, and no value of the others."""
    source = SettingsSource({"app.a": MARK, "app.b": " "}, ["app.a", "app.b", "App.C"])
    with pytest.raises(SettingMissingError) as caught:
        source.now()
    assert caught.value.names == ("app.b", "app.c")
    assert MARK not in str(caught.value)


async def test_a_session_of_another_kind() -> None:
    """Only an AsyncSession can have settings; another kind is refused before it begins."""
    from pgtoolset.testing import MemoryDatabase

    database = MemoryDatabase()
    async with database.session() as session:
        with pytest.raises(TypeError, match="settings: only an AsyncSession"):
            async with get_transaction(session, settings={"app.key": "x"}):
                raise AssertionError("the block has begun")
    with pytest.raises(TypeError, match="settings: only an AsyncSession"):
        async with create_db_context(database.session, settings={"app.key": "x"})():
            raise AssertionError("the block has begun")


async def test_nested_with_another_option() -> None:
    """Nested, settings are no reason to accept the other options."""
    async with nowhere() as session:
        session.sync_session.begin()
        with pytest.raises(TransactionStateError, match="read_only"):
            async with get_transaction(session, settings={"app.key": "x"}, read_only=True):
                raise AssertionError("the block has begun")


def test_equality() -> None:
    """Equal settings are equal and have one hash, in any spelling of their names."""
    one, other = check_settings({"APP.key": 1}), check_settings({"app.KEY": "1"})
    assert one == other
    assert hash(one) == hash(other)
    assert one != check_settings({"app.key": 2})
    assert not Settings({})
