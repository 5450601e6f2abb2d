"""Sessions, transactions, locks, row watching and many-to-many writes for PostgreSQL.

For SQLAlchemy's `AsyncSession`, FastAPI, and asyncpg or psycopg 3.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pgtoolset._native import implementation as _implementation
from pgtoolset._text import make_logs_safe as _make_logs_safe
from pgtoolset.errors import (
    CommitUnknownError,
    DatabaseExistsError,
    DatabaseInUseError,
    DatabaseNotFoundError,
    DeadlineExceededError,
    LockTimeoutError,
    OutsideReferenceError,
    PgToolsetError,
    PoolerError,
    PoolTimeoutError,
    RowDeletedError,
    RowNotFoundError,
    SettingMissingError,
    TransactionAbortedError,
    TransactionLostError,
    TransactionStateError,
    UnsupportedDriverError,
    UnsupportedVersionError,
    WaitTimeoutError,
    WatcherClosedError,
    WatchFailedError,
)

if TYPE_CHECKING:
    from pgtoolset.cleanup import cleanup_tables
    from pgtoolset.connections import driver_connection, release_connection
    from pgtoolset.databases import create_database, drop_database
    from pgtoolset.deadlines import deadline
    from pgtoolset.locks import advisory_lock, list_lock_waits, lock_rows, lock_tables
    from pgtoolset.m2m import m2m_add, m2m_add_many, m2m_remove, m2m_set
    from pgtoolset.pools import holders, warn_of_idle_transactions
    from pgtoolset.replicas import ReadReplicas, create_read_dependency
    from pgtoolset.sessions import create_db_context, create_db_dependency
    from pgtoolset.transactions import IsolationLevel, get_transaction, on_commit, run_transaction
    from pgtoolset.values import (
        Blocker,
        CodeLocation,
        ConnectionHolder,
        LockMode,
        LockWait,
        M2MChange,
        RetryAttempt,
        RowChange,
        RowLockMode,
    )
    from pgtoolset.watch import RowWatcher, row_change_trigger, wait_for_row_change

__all__ = [
    "Blocker",
    "CodeLocation",
    "CommitUnknownError",
    "ConnectionHolder",
    "DatabaseExistsError",
    "DatabaseInUseError",
    "DatabaseNotFoundError",
    "DeadlineExceededError",
    "IsolationLevel",
    "LockMode",
    "LockTimeoutError",
    "LockWait",
    "M2MChange",
    "OutsideReferenceError",
    "PgToolsetError",
    "PoolTimeoutError",
    "PoolerError",
    "ReadReplicas",
    "RetryAttempt",
    "RowChange",
    "RowDeletedError",
    "RowLockMode",
    "RowNotFoundError",
    "RowWatcher",
    "SettingMissingError",
    "TransactionAbortedError",
    "TransactionLostError",
    "TransactionStateError",
    "UnsupportedDriverError",
    "UnsupportedVersionError",
    "WaitTimeoutError",
    "WatchFailedError",
    "WatcherClosedError",
    "advisory_lock",
    "cleanup_tables",
    "create_database",
    "create_db_context",
    "create_db_dependency",
    "create_read_dependency",
    "deadline",
    "driver_connection",
    "drop_database",
    "get_transaction",
    "holders",
    "implementation",
    "list_lock_waits",
    "lock_rows",
    "lock_tables",
    "m2m_add",
    "m2m_add_many",
    "m2m_remove",
    "m2m_set",
    "on_commit",
    "release_connection",
    "row_change_trigger",
    "run_transaction",
    "wait_for_row_change",
    "warn_of_idle_transactions",
]

_make_logs_safe()

#: Which implementation of the hot modules is in use. Declared here, because pyright takes the type
#: of a name that is only imported here for `str`.
implementation: Literal["c", "python"] = _implementation

#: The version of the installed distribution.
__version__: str

if not TYPE_CHECKING:  # a checker would otherwise accept every name of the package
    #: The names of each module that is imported when one of them is first used: a program pays for
    #: the capabilities that it has. Type checkers read the imports above; a test compares the two.
    _NAMES = {
        "cleanup": ("cleanup_tables",),
        "connections": ("driver_connection", "release_connection"),
        "databases": ("create_database", "drop_database"),
        "deadlines": ("deadline",),
        "locks": ("advisory_lock", "list_lock_waits", "lock_rows", "lock_tables"),
        "m2m": ("m2m_add", "m2m_add_many", "m2m_remove", "m2m_set"),
        "pools": ("holders", "warn_of_idle_transactions"),
        "replicas": ("ReadReplicas", "create_read_dependency"),
        "sessions": ("create_db_context", "create_db_dependency"),
        "transactions": ("IsolationLevel", "get_transaction", "on_commit", "run_transaction"),
        "values": (
            "Blocker",
            "CodeLocation",
            "ConnectionHolder",
            "LockMode",
            "LockWait",
            "M2MChange",
            "RetryAttempt",
            "RowChange",
            "RowLockMode",
        ),
        "watch": ("RowWatcher", "row_change_trigger", "wait_for_row_change"),
        "events": (),
        "observe": (),
        "protocols": (),
        "types": (),
    }
    _HOMES = {name: module for module, names in _NAMES.items() for name in names}

    def __getattr__(name: str) -> Any:
        """Import a name that is first used, and read `__version__`, which takes a millisecond."""
        if name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        elif name in _NAMES:
            value = import_module(f"{__name__}.{name}")
        elif name == "__version__":
            value = _version()
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, value)

    def __dir__() -> list[str]:
        """Return the names, also of what nothing has used yet."""
        return sorted({*globals(), *__all__, *_NAMES, "__version__"})

    def _version() -> str:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("pgtoolset")
        except PackageNotFoundError as error:
            raise AttributeError("pgtoolset has no __version__, for it is not installed") from error
