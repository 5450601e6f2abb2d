"""The contract classes on a user's own implementation: the protocol suffices."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pgtoolset import create_db_context
from pgtoolset.testing.contracts import SessionFactoryContract, TransactionalSessionContract
from pgtoolset.testing.contracts.harness import missing
from tests.plugin.projects import ANYIO, ASYNCIO, Project, Warm
from tests.transactions.plain_session import PlainHarness, PlainManagedSession, PlainSession


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


@pytest.mark.parametrize("options", [ASYNCIO, ANYIO], ids=["asyncio", "anyio"])
def test_in_a_project_of_a_user(tmp_path: Path, warm: Warm, options: tuple[str, ...]) -> None:
    """Every contract class runs by pytest-asyncio and by anyio; a failure shows the compared
    values."""
    tests = Path(__file__).parents[1]
    for name in (
        "support.py",
        "m2m/models.py",
        "testing/linked.py",
        "testing/test_contracts_memory.py",
    ):
        copy = tmp_path / "tests" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tests / name, copy)
        (copy.parent / "__init__.py").touch()
    project = Project(tmp_path, None, warm)
    project.write(
        pytest_ini="[pytest]",
        conftest="""
            import pytest

            @pytest.fixture
            def anyio_backend():
                return "asyncio"
        """,
        test_broken="""
            import pytest
            from pgtoolset.testing import MemoryDatabase, MemoryLocks
            from pgtoolset.testing.contracts import LockObserverContract, MemoryRows
            from tests.support import Item

            class TestBroken(LockObserverContract):
                @pytest.fixture
                def harness(self):
                    return MemoryRows(MemoryDatabase(), Item, value="name")

                @pytest.fixture
                def locks(self):
                    return MemoryLocks()

                @pytest.fixture
                def observer(self):
                    class Inventive:
                        async def list_lock_waits(self, connection_or_session):
                            return ["a session"]

                    return Inventive()
        """,
    )
    outcome = project.run(*options, "--import-mode=importlib", "-W", "error")
    assert outcome.code == 1, outcome.output
    assert outcome.counts["passed"] > 100
    assert "'a session'" in outcome.output
