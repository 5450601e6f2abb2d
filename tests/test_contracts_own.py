"""The contract classes on what a user would write: they need nothing but the protocol."""

from __future__ import annotations

import pytest

from pgtoolset import create_db_context
from pgtoolset.testing.contracts import SessionFactoryContract, TransactionalSessionContract
from pgtoolset.testing.contracts.harness import missing

from .plain_session import PlainHarness, PlainManagedSession, PlainSession


class TestTransactionalSession(TransactionalSessionContract):
    @pytest.fixture(params=[PlainSession, PlainManagedSession])
    def harness(self, request: pytest.FixtureRequest) -> PlainHarness:
        return PlainHarness(request.param)


class TestSessionFactory(SessionFactoryContract):
    @pytest.fixture
    def harness(self) -> PlainHarness:
        return PlainHarness(PlainManagedSession)


async def test_a_session_of_a_context_is_closed() -> None:
    """The session that a context has made is closed at the end, whatever happened."""
    db_context = create_db_context(PlainHarness(PlainManagedSession).session)
    async with db_context() as session:
        assert not session.closed
    assert session.closed
    with pytest.raises(KeyError):
        async with db_context() as session:
            raise KeyError
    assert session.closed


def test_a_fixture_that_is_missing() -> None:
    """A subclass that does not give a fixture is told which, and what it is."""
    with pytest.raises(NotImplementedError, match="`locks`: the TableLocker"):
        missing("locks", "the TableLocker")
