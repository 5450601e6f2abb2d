"""No password reaches an error, its chain, a log, a warning or the output, wherever a URL is given.

Every argument of every public function receives every form of a URL, in the right place and in a
wrong one. No server is reached.
"""

from __future__ import annotations

import asyncio
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum
from functools import partial
from typing import Any

import pytest
from pydantic import PostgresDsn, TypeAdapter
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    Blocker,
    CodeLocation,
    ConnectionHolder,
    LockMode,
    LockWait,
    RowLockMode,
    RowWatcher,
)
from pgtoolset._text import one_line
from pgtoolset.testing import EmbeddedServer
from pgtoolset.testing.doubles import MemoryDatabase
from tests.arguments.test_bad_input import CALLS, MADE, WATCHER_CALLS, Call, carried_out, nowhere

PASSWORD = "hunter2"
TEXT = f"postgresql+asyncpg://me:{PASSWORD}@127.0.0.1:9/db"

TEXTS = [
    TEXT,
    f"postgresql://me:{PASSWORD}@127.0.0.1:9/db",
    f"postgresql://me:%40{PASSWORD}%2F@127.0.0.1:9/db",
    f"postgresql://me@127.0.0.1:9/db?password={PASSWORD}",
    f"postgresql://me@127.0.0.1:9/db?sslpassword={PASSWORD}&sslmode=require",
    f"postgresql://me@127.0.0.1:9/db?passfile=/{PASSWORD}",
    f"postgresql://me:{PASSWORD}@127.0.0.1:9,127.0.0.1:10/db",
    f"postgresql://me:{PASSWORD}@h:port/db",
    f"postgresql://me:{PASSWORD}@127.0.0.1:99999/db",
    f"postgresql://me:{PASSWORD}@[::1/db",
    f"postgresql://me@h:{PASSWORD}/db",
    f"postgresql://me:x@{PASSWORD}@h/db",
    f"postgresql://me:{PASSWORD}@h/db?connect_timeout=soon",
    f"postgresql://me:{PASSWORD}@h/db?channel_binding=require",
    f"postgresql%3A%2F%2Fme%3A{PASSWORD}%40h%2Fdb",
    f"postgres//me:{PASSWORD}@h/db",
    f"postgresql:/me:{PASSWORD}@h/db",
    f"me:{PASSWORD}@h/db",
    f"mysql://me:{PASSWORD}@h/db",
    f"host=127.0.0.1 port=9 user=me password={PASSWORD}",
    f"host=127.0.0.1 port=9 user=me password='{PASSWORD} w'",
    f"host=127.0.0.1 port=9 user=me password='{PASSWORD}",
    f"  {TEXT}\n",
]


class OwnUrl:
    def __str__(self) -> str:
        return TEXT

    __repr__ = __str__


class Text(str):
    """A string whose `repr` is its own."""

    def __repr__(self) -> str:
        return TEXT


class Setting(Enum):
    URL = TEXT


class TextSetting(StrEnum):
    URL = TEXT


@dataclass
class Settings:
    database_url: str = TEXT


def ignore(*_: object) -> None:
    """A callback."""


OBJECTS: list[Any] = [
    make_url(TEXT),
    make_url(f"postgresql+asyncpg://me@127.0.0.1:9/db?password={PASSWORD}"),
    TypeAdapter(PostgresDsn).validate_python(TEXT),
    TypeAdapter(PostgresDsn).validate_python(f"postgresql://me:{PASSWORD}@a:1,b:2/db"),
    OwnUrl(),
    Text(TEXT),
    Setting.URL,
    TextSetting.URL,
    Settings(),
    Settings,
    ValueError(TEXT),
    TEXT.encode(),
    bytearray(TEXT.encode()),
    [TEXT],
    (TEXT, [make_url(TEXT)]),
    {TEXT: TEXT},
    {"password": PASSWORD},
    {1: TEXT},
    {TEXT},
    partial(ignore, TEXT),
]

FORMS: list[Any] = [*TEXTS, *OBJECTS]


def said(error: BaseException | None, seen: frozenset[int] = frozenset()) -> Iterator[str]:
    """Everything that a reader of an error can see of it and of what it is chained to."""
    if error is None or id(error) in seen:
        return
    yield from (str(error), repr(error), repr(error.args), *getattr(error, "__notes__", ()))
    yield from traceback.format_exception(error)
    yield from map(repr, vars(error).values())
    seen |= {id(error)}
    yield from said(error.__cause__, seen)
    yield from said(error.__context__, seen)
    for each in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        yield from said(each, seen)


async def leaks(function: Callable[..., Any], call: Call, name: str, given: list[Any]) -> list[str]:
    """The forms whose password is in what a call says."""
    found = []
    for form in given:
        arguments = {
            key: made() if callable(made) and key in MADE else made
            for key, made in call.arguments.items()
        }
        opened = [each for each in arguments.values() if isinstance(each, AsyncSession)]
        arguments[name] = form
        heard: list[str] = []
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                async with asyncio.timeout(2):
                    await carried_out(function, arguments)
        except Exception as error:
            heard += said(error)
        finally:
            for each in opened:
                await each.close()
        heard += [str(each.message) for each in caught]
        found += [f"{form!r}: {each}" for each in heard if PASSWORD in each][:1]
    return found


def cases(calls: list[Call]) -> list[Any]:
    return [
        pytest.param(call, parameter.name, id=f"{call.name}-{parameter.name}")
        for call in calls
        for parameter in call.parameters()
    ]


def check_output(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = capsys.readouterr()
    records = [f"{each.getMessage()} {each.exc_text}" for each in caplog.records]
    ours = [each for each in records if PASSWORD in each]
    assert not ours
    assert PASSWORD not in caplog.text
    assert PASSWORD not in out + err


@pytest.mark.parametrize(("call", "name"), cases(CALLS))
async def test_functions(
    call: Call,
    name: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A URL in any form as any argument of any public function: no one sees its password."""
    caplog.set_level("DEBUG", "pgtoolset")
    found = await leaks(call.function, call, name, FORMS)
    assert not found, "\n".join(found)
    check_output(caplog, capsys)


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.parametrize(("call", "name"), cases(WATCHER_CALLS))
async def test_watchers(engine: AsyncEngine, call: Call, name: str) -> None:
    """The same of the methods of a `RowWatcher`, which is connected."""
    async with RowWatcher(engine) as watcher:
        assert PASSWORD not in repr(watcher)
        found = await leaks(partial(call.function, watcher), call, name, FORMS)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_modes_and_servers(form: Any) -> None:
    """The same of the modes of locks and of the embedded server."""
    calls: list[Callable[[], Any]] = [
        lambda: LockMode(form),
        lambda: RowLockMode(form),
        lambda: EmbeddedServer(version=form),
        lambda: EmbeddedServer(timeout=form),
    ]
    if not isinstance(form, dict):
        calls.append(lambda: EmbeddedServer(settings=form))
    for call in calls:
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        assert PASSWORD not in "".join(said(caught.value))


async def test_an_engine_and_a_factory_in_place_of_others() -> None:
    """An engine and a factory that know a URL show it in no place that is not theirs."""
    engine = nowhere.execution_options()
    for form in (engine, async_sessionmaker(engine), AsyncSession(engine), engine.connect()):
        for call in CALLS:
            for parameter in call.parameters():
                if parameter.name in (
                    "session",
                    "session_maker",
                    "engine",
                    "connection_or_session",
                ):
                    continue
                found = await leaks(call.function, call, parameter.name, [form])
                assert not found, "\n".join(found)


def test_objects_show_no_url() -> None:
    """The `repr` of what the library gives its users has no password in it."""
    query = f"SELECT dblink('host=h password={PASSWORD}', 'postgresql://me:{PASSWORD}@h/db')"
    for each in (
        EmbeddedServer(settings={"application_name": TEXT}),
        RowWatcher(create_async_engine(TEXT)),
        Blocker(1, TEXT, "active", query, None),
        ConnectionHolder(TEXT, 1.0, CodeLocation("app.py", 1, "f"), one_line(query)),
        LockWait(1, (2,), "item", "SHARE", None, TEXT, query),
        MemoryDatabase(),
        MemoryDatabase().session(),
    ):
        assert PASSWORD not in repr(each) + str(each)
