"""Session factories of the application, bound to the transaction of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from sqlalchemy.ext.asyncio import async_sessionmaker

Bind: TypeAlias = Callable[[async_sessionmaker[Any]], None]


@contextmanager
def bound_factories(target: async_sessionmaker[Any]) -> Iterator[Bind]:
    """Yield a function that gives a factory the connection of `target` for the block."""
    before: list[tuple[async_sessionmaker[Any], dict[str, Any]]] = []

    def bind(session_maker: async_sessionmaker[Any]) -> None:
        if not isinstance(session_maker, async_sessionmaker):
            raise TypeError(
                "pg_bind takes an async_sessionmaker, not an object of the class "
                f"{type(session_maker).__name__}. The one of an async_scoped_session is its "
                "session_factory"
            )
        if all(session_maker is not each for each, _ in before):
            before.append((session_maker, dict(session_maker.kw)))
        # An engine for each class would have precedence over the bind.
        session_maker.kw.pop("binds", None)
        session_maker.configure(
            bind=target.kw["bind"],
            join_transaction_mode=target.kw["join_transaction_mode"],
            info={**(session_maker.kw.get("info") or {}), **target.kw["info"]},
        )

    try:
        yield bind
    finally:
        for session_maker, keywords in before:
            session_maker.kw.clear()
            session_maker.kw.update(keywords)
