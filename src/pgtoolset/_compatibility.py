"""Names of other packages that are not public, and the error for a version that lacks one.

A function here uses the public name where the installed version has one. `docs/compatibility.md`
lists every private name that the library uses, and `tests/test_compatibility.py` finds each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from types import MethodType
from typing import Any, Literal

from sqlalchemy import Connection, Dialect
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.attributes import instance_state

from pgtoolset.errors import UnsupportedVersionError

_IS_CONNECTIONS_PUBLIC = hasattr(SessionTransaction, "connections")


def unsupported(
    package: str, missing: str, consequence: str, advice: str = ""
) -> UnsupportedVersionError:
    """Return the error for an installed package that lacks a name which the library needs.

    Args:
        package: its name on PyPI.
        missing: the name that the installed version does not have.
        consequence: what the library cannot do without it.
        advice: which version to use; a general sentence by default.
    """
    advice = advice or "Use a version that docs/compatibility.md lists, or a newer pgtoolset."
    return UnsupportedVersionError(
        f"{consequence}: {package} {_installed_version(package)} has no {missing}. {advice}"
    )


def execute_of(session: Any) -> Callable[..., Any]:
    """Return a session's `execute`, without the warning of a class that has deprecated it.

    SQLModel's has, in favour of an `exec` with other results. The warning is for users' code, and
    `typing.deprecated` keeps the method that it wraps.
    """
    execute: Callable[..., Any] = session.execute
    function = getattr(execute, "__wrapped__", None) if hasattr(execute, "__deprecated__") else None
    return execute if function is None else MethodType(function, session)


def connections_of(transaction: SessionTransaction | None) -> Collection[Connection]:
    """Return the connections that a transaction of a session uses, without taking one.

    They are public as `SessionTransaction.connections` from SQLAlchemy 2.1.7 on.
    """
    if transaction is None:
        return ()
    if _IS_CONNECTIONS_PUBLIC:
        return transaction.connections
    try:
        entries = transaction._connections.values()
    except AttributeError:
        raise unsupported(
            "sqlalchemy",
            "SessionTransaction.connections",
            "pgtoolset cannot find the connections of a transaction",
        ) from None
    return {connection for connection, *_ in entries}


def error_of_failed_flush(transaction: SessionTransaction) -> BaseException | None:
    """Return the error of the flush that made SQLAlchemy roll `transaction` back.

    `None` where SQLAlchemy does not keep it: the caller then names the last error of a statement.
    """
    error: BaseException | None = getattr(transaction, "_rollback_exception", None)
    return error


def isolation_level_at_connect(dialect: Dialect) -> str | None:
    """Return `isolation_level` of `create_engine`.

    `None` where SQLAlchemy does not keep it: AUTOCOMMIT is then seen at the first connection.
    """
    level: str | None = getattr(dialect, "_on_connect_isolation_level", None)
    return level


def is_in_block(session: Session) -> bool:
    """Whether a block such as `with session.begin()` is open, which its own end must close."""
    try:
        return session._trans_context_manager is not None
    except AttributeError:
        raise unsupported(
            "sqlalchemy",
            "Session._trans_context_manager",
            "pgtoolset cannot see whether a session is inside an open block",
        ) from None


def written_by(session: Session, key: Any) -> Literal["written", "deleted"] | None:
    """Return what the ORM has flushed of a row in the open transaction of a session.

    An ORM-enabled UPDATE or DELETE counts where it synchronizes the session. `None` also where the
    application holds no instance of the row any more.

    Args:
        session: the session.
        key: the identity key of the row.
    """
    transaction = session.get_nested_transaction() or session.get_transaction()
    present: Any = session.identity_map.get(key)
    state = None if present is None else instance_state(present)
    try:
        while transaction is not None:
            if state is None:
                gone = [each.key for each in transaction._deleted]
                gone += [old for old, _ in transaction._key_switches.values()]
                if key in gone:
                    return "deleted"
            elif state in transaction._new or state in transaction._dirty:
                return "written"
            transaction = transaction.parent
    except AttributeError:
        raise unsupported(
            "sqlalchemy",
            "SessionTransaction._new, _dirty, _deleted or _key_switches",
            "pgtoolset cannot see which rows the open transaction of a session has written",
        ) from None
    return None


def _installed_version(package: str) -> str:
    # The metadata of a package is in a file, and this may run in an event loop.
    loaded: str | None = getattr(sys.modules.get(package), "__version__", None)
    if loaded is not None:
        return loaded
    try:
        return version(package)
    except PackageNotFoundError:
        return "of an unknown version"
