"""Bad input: each argument of each public function, wrong in several ways, is refused before SQL.

The test reads the signatures, so a new function or argument fails it until it is listed here. The
engine's server cannot be reached, so a function that asks it anything fails with another error.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import make_transient_to_detached

import pgtoolset
import pgtoolset.observe as pgtoolset_observe
from pgtoolset import PgToolsetError, ReadReplicas, RowWatcher, protocols, testing
from pgtoolset import fastapi as pgtoolset_fastapi
from pgtoolset.fastapi import install_error_handlers, problem_responses
from pgtoolset.observe import subscribe
from pgtoolset.observe.otel import OpenTelemetryObserver
from pgtoolset.testing import (
    create_db_session,
    create_test_client,
    create_worker_database,
    worker_database_url,
)
from tests.m2m.models import Post, Tag
from tests.support import Base, Item

SECRET = "postgresql+asyncpg://user:secret@127.0.0.1:9/database"
nowhere = create_async_engine("postgresql+asyncpg://user:other@127.0.0.1:9/database")
session_maker = async_sessionmaker(nowhere)


async def work(session: AsyncSession) -> None:
    """What `run_transaction` runs; it asks the server nothing."""


def post() -> Post:
    instance = Post(id=1)
    make_transient_to_detached(instance)
    return instance


def tag() -> Tag:
    instance = Tag(key=1)
    make_transient_to_detached(instance)
    return instance


#: Nothing that a function takes, but for those that take everything.
NOTHING: list[Any] = [object(), SECRET, 1j, [object()]]

WRONG_TIMES: list[Any] = [True, 1j, "5 fortnights", -1, timedelta(seconds=-1), SECRET, [1]]
WRONG_FLAGS: list[Any] = [0, "yes", None, SECRET]
WRONG_KEYS: list[Any] = [1.5, True, "x", SECRET, 2**40, None, (1, 2), {"other": 1}, object()]
WRONG_NAMES: list[Any] = [None, 5, "", "nul\0", "x" * 64, ["a"], b"a"]
WRONG_OPTIONS: list[Any] = ["a level", 5, SECRET, object(), 1j]

#: What is wrong for an argument, by its name.
WRONG: dict[str, list[Any]] = {
    "timeout": WRONG_TIMES,
    "deadline": [*WRONG_TIMES, 0, "0s", float("nan"), float("inf"), work],
    "resolve_commit": [*WRONG_TIMES, 0, float("nan"), work],
    "interval": [*WRONG_TIMES, 0, None],
    "limit": [*WRONG_TIMES, 0, None],
    "durable": WRONG_FLAGS,
    "commit": WRONG_FLAGS,
    "shared": WRONG_FLAGS,
    "nowait": WRONG_FLAGS,
    "skip_locked": WRONG_FLAGS,
    "ignore_conflicts": WRONG_FLAGS,
    "keep_existing": WRONG_FLAGS,
    "exist_ok": WRONG_FLAGS,
    "missing_ok": WRONG_FLAGS,
    "force": WRONG_FLAGS,
    "notify": WRONG_FLAGS,
    "read_only": [0, "yes", SECRET],
    "deferrable": [0, "yes", SECRET],
    "isolation_level": WRONG_OPTIONS,
    "mode": ["a mode", 5, SECRET, object(), None],
    "key": [1.5, None, 2**63, (1, 2, 3), (1, 2**31), ("a", "b"), True],
    "pk_value": WRONG_KEYS,
    "pks": [5, "ab", SECRET, None, object(), *([key] for key in WRONG_KEYS)],
    "links": [5, "ab", SECRET, None, [1], [(1,)], [(1, 1.5)], [(True, 1)], [(1, 2**40)]],
    "related": [5, SECRET, None, Item(id=1), [tag], Tag()],
    "instance": [5, SECRET, None, Item(id=1), Post()],
    "columns": [5, "balance", SECRET, [5], ["no such column"], [Tag.key], [], Item.name],
    "baseline": [5, SECRET, Tag(), {"no such column": 1}, object()],
    "values": [5, SECRET, ["a"], {"no such column": 1}, {5: 1}],
    "until": [5, SECRET, work, object()],
    "tables": [5, SECRET, [], [5], Item, Item.__table__, ["item"], [object()]],
    "attempts": [0, -1, 1.5, True, "5", SECRET, None],
    "db_name": WRONG_NAMES,
    "template": [5, "", "nul\0", "x" * 64, b"a"],
    "default_test_db": [None, 5, "", "nul\0", ["a"]],
    "prefix": [5, "nul\0", ["a"], b"a"],
    "database_url": [5, None, "no url", "mysql://user:secret@h/d", object(), ["a"]],
    "server_url": [5, "no url", "mysql://user:secret@h/d", object(), ["a"]],
    "base": [5, SECRET, Item(id=1), object()],
    "work": [5, SECRET, None, object()],
    "observer": [5, SECRET, None, object(), work, AsyncSession],
    "tracer_provider": [5, SECRET, object(), print],
    "meter_provider": [5, SECRET, object(), print],
    "pool_name": [5, "", b"a", ["a"], SECRET],
    "callback": [5, SECRET, None, object()],
    "retry_on": [5, SECRET, object(), work],
    "on_retry": [5, SECRET, object()],
    "session_maker": [5, SECRET, None, object(), nowhere],
    "primary": [5, SECRET, None, object(), nowhere],
    "standbys": [5, SECRET, None, session_maker, [5], [SECRET], [nowhere], {session_maker}],
    "max_wait": [*WRONG_TIMES, 0, None],
    "header": [None, 5, "", "a b", "a:b", "a\r\nb", "\xe4", "x" * 101, SECRET, b"a"],
    "cookie": [5, "", "a b", "a=b", "a;b", "a\r\nb", "x" * 101, SECRET, b"a"],
    "after": [5, True, b"1.1.1.1", object(), ["1.1.1.1"]],
    "app": [5, SECRET, None, object()],
    "dependency_overrides": [5, SECRET, [work], {"get_db": work}, {work: None}, object()],
    "constraints": [5, SECRET, ["a"], {5: "a"}, {"": "a"}, {"x" * 64: "a"}, {"a": 5}, {"a": " "}],
    "retry_after": [*WRONG_TIMES, 0, None],
    "type_base": [5, "", "a b", "a\r\nb", "\xe4", SECRET, b"https://example.com/"],
    "openapi": WRONG_FLAGS,
    "statuses": [[500], ["404"], [True], [None], [404, 200], [SECRET], [object()]],
    "base_url": [5, None, "", "test", "/path", "http://", SECRET, b"http://test"],
    "lifespan": WRONG_FLAGS,
    "settings": [
        *(5, SECRET, object(), [("app.key", "x")], {"no name": 1}, {5: 1}, {"": 1}, {"app.": 1}),
        *({"app.key": each} for each in (None, "nul\0", [SECRET], b"x", float("nan"), "\ud800")),
        *({"app.key": 1, "APP.Key": SECRET}, {"search_path": f'"{SECRET}'}, {"x" * 64: SECRET}),
        {"app.key": timedelta(-1)},
    ],
    "require": [5, SECRET, "app.key", b"app.key", None, [5], ["no name"], {"app.key": 1}, [None]],
}

#: Arguments that take every value of Python's, or whose mistakes SQLAlchemy names.
ANYTHING: dict[str, str] = {
    "session_options": "keywords of async_sessionmaker",
    "engine_options": "keywords of create_async_engine",
}


@dataclass
class Call:
    """A public function and arguments with which it is called well."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    more: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.function.__qualname__

    def parameters(self) -> list[inspect.Parameter]:
        found = inspect.signature(self.function).parameters.values()
        return [each for each in found if each.name != "self"]


def session() -> AsyncSession:
    return session_maker()


def in_transaction() -> AsyncSession:
    opened = session_maker()
    opened.sync_session.begin()
    return opened


replicas = ReadReplicas(session_maker, [session_maker])

M2M = {"session": session, "instance": post, "rel_attr": Post.tags, "related": tag}
WATCHED = {"model": Item, "pk_value": 1}
URL = "postgresql+asyncpg://user:other@127.0.0.1:9/database"

CALLS = [
    Call(pgtoolset.create_db_dependency, {"session_maker": session_maker}),
    Call(pgtoolset.create_db_context, {"session_maker": session_maker}),
    Call(pgtoolset.create_read_dependency, {"replicas": replicas}),
    Call(ReadReplicas, {"primary": session_maker, "standbys": [session_maker]}),
    Call(replicas.read, {}),
    Call(replicas.run, {"work": work}),
    Call(replicas.position, {"session": session}),
    Call(replicas.install, {"app": FastAPI()}),
    Call(
        pgtoolset.deadline,
        {"timeout": 1},
        {"timeout": [0, 0.0, "0ms", timedelta(0), float("nan"), float("inf"), None, work]},
    ),
    Call(pgtoolset.get_transaction, {"session": session}),
    Call(pgtoolset.on_commit, {"session": in_transaction, "callback": print}),
    Call(pgtoolset.run_transaction, {"session_maker": session_maker, "work": work}),
    Call(pgtoolset.release_connection, {"session": session}),
    Call(pgtoolset.driver_connection, {"session": session}),
    Call(pgtoolset.lock_tables, {"session": session, "tables": [Item]}),
    Call(pgtoolset.advisory_lock, {"session": session, "key": 1}),
    Call(pgtoolset.lock_rows, {"session": session, "model": Item, "pks": [1]}),
    Call(pgtoolset.list_lock_waits, {"connection_or_session": session}),
    Call(pgtoolset.wait_for_row_change, {"session": session, **WATCHED}),
    Call(pgtoolset.row_change_trigger, {"model": Item}),
    Call(pgtoolset.m2m_add, M2M),
    Call(pgtoolset.m2m_remove, M2M),
    Call(pgtoolset.m2m_set, M2M),
    Call(pgtoolset.m2m_add_many, {"session": session, "rel_attr": Post.tags, "links": [(1, 1)]}),
    Call(pgtoolset.create_database, {"db_name": "a", "server_url": URL}, {"server_url": [None]}),
    Call(pgtoolset.drop_database, {"db_name": "a", "server_url": URL}, {"server_url": [None]}),
    Call(pgtoolset.cleanup_tables, {"session": session, "base": Base}),
    Call(pgtoolset.holders, {"engine": nowhere}),
    Call(pgtoolset.warn_of_idle_transactions, {"engine": nowhere, "limit": 1}),
    Call(RowWatcher, {"engine": nowhere}),
    Call(create_worker_database, {"database_url": URL}),
    Call(worker_database_url, {"database_url": URL, "default_test_db": "a"}),
    Call(create_test_client, {"app": FastAPI()}),
    Call(create_db_session, {"database_url": URL, "base": MetaData()}),
    Call(install_error_handlers, {"app": FastAPI()}),
    Call(subscribe, {"engine": create_async_engine(SECRET), "observer": print}),
    Call(OpenTelemetryObserver, {"engine": nowhere}),
    Call(problem_responses, {"statuses": [404]}),
]


WATCHER_CALLS = [Call(RowWatcher.wait, WATCHED), Call(RowWatcher.changes, WATCHED)]

#: Arguments that are made anew for each call.
MADE = ("session", "instance", "related", "connection_or_session")


def cases(calls: list[Call]) -> Iterator[Any]:
    for call in calls:
        for parameter in call.parameters():
            name = parameter.name
            if name in ANYTHING:
                continue
            wrong = [*WRONG.get(name, [*NOTHING, 5]), *call.more.get(name, [])]
            if parameter.default is None:
                wrong = [value for value in wrong if value is not None]
            yield pytest.param(call, name, wrong, id=f"{call.name}-{name}")


async def carried_out(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Call the function, and enter, await or begin to iterate what it returns."""
    if "related" in arguments:
        names = ("session", "instance", "rel_attr", "related")
        positional = [arguments.pop(name) for name in names]
        result = function(*positional, **arguments)
    elif "statuses" in arguments:
        statuses = arguments["statuses"]
        result = function(*statuses if isinstance(statuses, list) else [statuses])
    else:
        result = function(**arguments)
    if inspect.isawaitable(result):
        await result
    elif hasattr(result, "__aenter__") and not isinstance(result, RowWatcher):
        async with result:
            pass


async def complaints(
    function: Callable[..., Any], call: Call, name: str, values: list[Any]
) -> list[str]:
    """What is wrong with the answers to wrong values of an argument."""
    found = []
    for value in values:
        arguments = {
            key: made() if inspect.isfunction(made) and key in MADE else made
            for key, made in call.arguments.items()
        }
        opened = [each for each in arguments.values() if isinstance(each, AsyncSession)]
        arguments[name] = value
        try:
            async with asyncio.timeout(5):
                await carried_out(function, arguments)
            found.append(f"{value!r} is accepted")
        except (TypeError, ValueError, PgToolsetError) as error:
            message = str(error)
            if name not in message:
                found.append(f"{value!r}: the argument is not named: {message}")
            if "secret" in message or "127.0.0.1" in message:
                found.append(f"{value!r}: a URL is shown: {message}")
        except Exception as error:
            found.append(f"{value!r}: {type(error).__name__}: {error}")
        finally:
            for each in opened:
                await each.close()
    return found


@pytest.mark.parametrize(("call", "name", "values"), list(cases(CALLS)))
async def test_refused(call: Call, name: str, values: list[Any]) -> None:
    """The error is a TypeError, a ValueError or ours, names the argument, and shows no URL."""
    found = await complaints(call.function, call, name, values)
    assert not found, "\n".join(found)


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.parametrize(("call", "name", "values"), list(cases(WATCHER_CALLS)))
async def test_refused_by_a_watcher(
    engine: AsyncEngine, call: Call, name: str, values: list[Any]
) -> None:
    """The same of the methods of a `RowWatcher`, which is connected."""
    async with RowWatcher(engine) as watcher:
        found = await complaints(partial(call.function, watcher), call, name, values)
    assert not found, "\n".join(found)


def test_every_public_function_is_here() -> None:
    """A function that is public and not in the list fails this test."""
    public = {
        each
        for module in (pgtoolset, testing, pgtoolset_fastapi, pgtoolset_observe)
        for each in vars(module).values()
        if inspect.isfunction(each) and each.__name__ in module.__all__
    }
    assert public - {call.function for call in CALLS} == set()


def test_every_argument_is_tried() -> None:
    """Each argument of each function is tried in at least three ways."""
    tried = {
        (case.values[0].name, case.values[1]): len(case.values[2])
        for case in cases(CALLS + WATCHER_CALLS)
    }
    for call in CALLS + WATCHER_CALLS:
        for parameter in call.parameters():
            if parameter.name not in ANYTHING:
                assert tried[call.name, parameter.name] >= 3, (call.name, parameter.name)


def test_protocols_have_the_same_arguments() -> None:
    """What a protocol's method takes, its function takes: the list covers both."""
    functions = {call.function.__name__: call for call in CALLS + WATCHER_CALLS}
    for name in protocols.__all__:
        for method, function in vars(getattr(protocols, name)).items():
            if method in functions and inspect.isfunction(function):
                ours = {parameter.name for parameter in functions[method].parameters()}
                theirs = set(inspect.signature(function).parameters) - {"self"}
                assert theirs <= ours, (name, method)
