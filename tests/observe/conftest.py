"""Fixtures of the room."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import create_db_context
from pgtoolset.observe import Event, TransactionEnded, subscribe
from pgtoolset.protocols import DatabaseContext

E = TypeVar("E")


class Events(list[Event]):
    """The events that an observer has received."""

    def of(self, kind: type[E]) -> list[E]:
        """Return and forget the events of one kind."""
        found = [event for event in self if isinstance(event, kind)]
        self[:] = [event for event in self if not isinstance(event, kind)]
        return found

    def ends(self) -> list[tuple[str, str | None]]:
        """Return and forget how each transaction has ended."""
        return [(each.outcome, each.sqlstate) for each in self.of(TransactionEnded)]


@pytest.fixture
def events(engine: AsyncEngine) -> Iterator[Events]:
    """The events of the engine."""
    found = Events()
    unsubscribe = subscribe(engine, found.append)
    yield found
    unsubscribe()
    methods: dict[Any, Any] = vars(engine.dialect)
    assert not methods["pgtoolset.observers"]
    assert "pgtoolset.endings" not in methods


@pytest.fixture
def db_context(session_maker: async_sessionmaker[AsyncSession]) -> DatabaseContext[AsyncSession]:
    return create_db_context(session_maker)
