"""The last statement on each connection, noted in the methods that execute it.

An event of SQLAlchemy's would put each statement on its slow path.
https://docs.sqlalchemy.org/en/20/core/internals.html#sqlalchemy.engine.default.DefaultDialect
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, TypeAlias

from sqlalchemy import Dialect, PoolProxiedConnection
from sqlalchemy.engine.interfaces import DBAPICursor

from pgtoolset._postgres.holders import held_on

#: The methods of a dialect that execute a statement.
_EXECUTING = ("do_execute", "do_executemany", "do_execute_no_params")

#: Two of them: with the cursor, the statement, its parameters, and its context where there is one.
Execute: TypeAlias = Callable[..., None]

#: In the attributes of a dialect: the methods below those of `note_statements`.
_KEY = "pgtoolset.statements"

#: In the attributes of a dialect whose transactions are followed from their begin on.
_BEGINS = "pgtoolset.begins"


def note_statements(dialect: Dialect) -> None:
    """Note the last statement on each connection of an engine. Only the first call does work."""
    methods = vars(dialect)
    if _KEY not in methods:
        below: dict[Any, Any] = {name: getattr(dialect, name) for name in _EXECUTING}
        wrap_statements(dialect, noted)
        methods[_KEY] = {methods[name]: execute for name, execute in below.items()}


def wrap_statements(dialect: Dialect, wrap: Callable[[Execute], Execute]) -> None:
    """Put a wrapper around the methods of a dialect that execute a statement.

    It takes the place of that of `note_statements`, whose work is to be done in it: each call that
    a statement passes through costs all statements.
    """
    methods = vars(dialect)
    below: Mapping[Any, Any] = methods.get(_KEY, {})
    for name in _EXECUTING:
        execute = getattr(dialect, name)
        execute = below.get(execute, execute)
        is_without = name == "do_execute_no_params"
        methods[name] = _wrapped_without_parameters(wrap, execute) if is_without else wrap(execute)


def _wrapped_without_parameters(
    wrap: Callable[[Execute], Execute], execute: Callable[..., None]
) -> Callable[..., None]:
    def execute_without(cursor: DBAPICursor, statement: str, _: Any, context: Any) -> None:
        execute(cursor, statement, context)

    wrapped = wrap(execute_without)

    def without_parameters(cursor: DBAPICursor, statement: str, context: Any = None) -> None:
        wrapped(cursor, statement, (), context)

    return without_parameters


def noted(execute: Execute) -> Execute:
    """Return one of the methods of a dialect that execute a statement, which notes it."""

    def note(cursor: DBAPICursor, statement: str, parameters: Any, context: Any = None) -> None:
        held = None if context is None else held_on(context.root_connection.connection)
        if held is None:
            execute(cursor, statement, parameters, context)
            return
        held.statement = statement
        try:
            execute(cursor, statement, parameters, context)
        finally:
            held.idle_since = monotonic()

    return note


def note_begins(dialect: Dialect) -> None:
    """Follow the begin of each transaction of an engine, so that each is reported once."""
    methods = vars(dialect)
    if _BEGINS in methods:
        return
    methods[_BEGINS] = True
    begin = dialect.do_begin

    def do_begin(connection: PoolProxiedConnection) -> None:
        held = held_on(connection)
        if held is not None:
            held.is_reported = False
            held.idle_since = monotonic()
        begin(connection)

    methods["do_begin"] = do_begin
