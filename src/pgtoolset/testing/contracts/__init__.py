"""The promises of the protocols as test classes, which run on the doubles, PostgreSQL, and yours.

Subclass one, give it the fixtures that its docstring names, and pytest runs its tests:

    class TestMyLocks(TableLockerContract):
        @pytest.fixture
        def locks(self) -> TableLocker:
            return MyLocks()

        @pytest.fixture
        def harness(self, session_maker) -> MappedRows:
            return MappedRows(session_maker, Order, value=Order.status)

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

from pgtoolset.testing.contracts.associations import (  # noqa: E402
    AssociationWriterContract,
    LinkedRows,
    LinksHarness,
    MemoryLinks,
)
from pgtoolset.testing.contracts.harness import (  # noqa: E402
    MappedRows,
    MemoryRows,
    RowsHarness,
    TransactionHarness,
)
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
    "LinksHarness",
    "LockObserverContract",
    "MappedRows",
    "MemoryLinks",
    "MemoryRows",
    "RowLockerContract",
    "RowsHarness",
    "SessionFactoryContract",
    "TableLockerContract",
    "TransactionHarness",
    "TransactionalSessionContract",
    "WatcherContract",
]
