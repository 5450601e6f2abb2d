"""What an implementation of a protocol promises, as test classes that run on any: the doubles,
PostgreSQL, and yours.

Subclass one, give it the fixtures that it asks for, and pytest runs its tests:

    class TestMyLocks(TableLockerContract):
        @pytest.fixture
        def locks(self) -> TableLocker:
            return MyLocks()

        @pytest.fixture
        def harness(self, session_maker) -> MappedRows:
            return MappedRows(session_maker, Order, value="status")

The tests are coroutines. With pytest-asyncio set `asyncio_mode = "auto"` or mark the class with
`pytest.mark.asyncio`; with anyio mark it with `pytest.mark.anyio` and run it on the asyncio
backend.
"""

import pytest

pytest.register_assert_rewrite(
    *(
        f"{__name__}.{name}"
        for name in ("transactions", "locks", "row_locks", "associations", "watching")
    )
)

from pgtoolset.testing.contracts.associations import AssociationWriterContract, LinkedRows  # noqa: E402
from pgtoolset.testing.contracts.harness import MappedRows, TransactionHarness  # noqa: E402
from pgtoolset.testing.contracts.locks import AdvisoryLockerContract, TableLockerContract  # noqa: E402
from pgtoolset.testing.contracts.row_locks import LockObserverContract, RowLockerContract  # noqa: E402
from pgtoolset.testing.contracts.transactions import (  # noqa: E402
    AbortedTransactionContract,
    SessionFactoryContract,
    TransactionalSessionContract,
)
from pgtoolset.testing.contracts.watching import ChangeWaiterContract, WatcherContract  # noqa: E402

__all__ = [
    "AbortedTransactionContract",
    "AdvisoryLockerContract",
    "AssociationWriterContract",
    "ChangeWaiterContract",
    "LinkedRows",
    "LockObserverContract",
    "MappedRows",
    "RowLockerContract",
    "SessionFactoryContract",
    "TableLockerContract",
    "TransactionHarness",
    "TransactionalSessionContract",
    "WatcherContract",
]
