"""The options of a transaction: checked here, and sent by `pgtoolset._blocks`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from pgtoolset._arguments.mappings import check_flag
from pgtoolset._arguments.settings import Settings
from pgtoolset._arguments.shown import shown
from pgtoolset._arguments.times import optional_seconds
from pgtoolset.types import Duration

IsolationLevel: TypeAlias = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]

#: What SQLAlchemy calls them as execution options of a connection.
#: https://docs.sqlalchemy.org/en/20/dialects/postgresql.html#setting-read-only-deferrable
_EXECUTION_OPTIONS = {
    "isolation_level": "isolation_level",
    "read_only": "postgresql_readonly",
    "deferrable": "postgresql_deferrable",
}

#: What SET TRANSACTION calls them. The driver's BEGIN can say the first of each, not the second.
#: https://www.postgresql.org/docs/current/sql-set-transaction.html
_FLAGS = {
    "read_only": ("READ ONLY", "READ WRITE"),
    "deferrable": ("DEFERRABLE", "NOT DEFERRABLE"),
}


@dataclass(frozen=True, slots=True)
class TransactionOptions:
    """The options of an outermost transaction; `None` leaves the server's default.

    Attributes:
        resolve_commit: the time in which a commit without an answer is to be resolved.
        settings: of the transaction, checked; a nested block can have them too.
    """

    durable: bool = False
    isolation_level: IsolationLevel | None = None
    read_only: bool | None = None
    deferrable: bool | None = None
    resolve_commit: Duration | None = None
    settings: Settings | None = None

    def __post_init__(self) -> None:
        check_flag("durable", self.durable)
        _check_isolation_level(self.isolation_level)
        for name in ("read_only", "deferrable"):
            if getattr(self, name) is not None:
                check_flag(name, getattr(self, name))
        check_resolve_commit(self.resolve_commit)

    def names(self) -> list[str]:
        """Return the names of the options that were given, and that a nested block cannot have."""
        resolves = self.resolve_commit is not None
        return ["durable"] * self.durable + list(self._settings()) + ["resolve_commit"] * resolves

    @property
    def resolve_seconds(self) -> float | None:
        """`resolve_commit` in seconds."""
        return check_resolve_commit(self.resolve_commit)

    def execution_options(self) -> dict[str, Any]:
        """Return the execution options of the connection, for its BEGIN."""
        return {_EXECUTION_OPTIONS[name]: value for name, value in self._settings().items()}

    def remaining_modes(self) -> list[str]:
        """Return the modes of SET TRANSACTION that no execution option has."""
        settings = self._settings()
        return [no for name, (_, no) in _FLAGS.items() if settings.get(name) is False]

    def modes(self) -> list[str]:
        """Return all options as the modes of SET TRANSACTION."""
        modes = [] if self.isolation_level is None else [f"ISOLATION LEVEL {self.isolation_level}"]
        settings = self._settings()
        yes = [yes for name, (yes, _) in _FLAGS.items() if settings.get(name) is True]
        return [*modes, *yes, *self.remaining_modes()]

    def _settings(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in _EXECUTION_OPTIONS}
        return {name: value for name, value in values.items() if value is not None}


def check_resolve_commit(resolve_commit: object) -> float | None:
    """Return the seconds in which a commit without an answer is to be resolved, `None` for never.

    Raises:
        TypeError, ValueError: it is not a length of time, or not above 0.
    """
    return optional_seconds("resolve_commit", resolve_commit)


def _check_isolation_level(level: object) -> None:
    if level is None:
        return
    levels = get_args(IsolationLevel)
    known = f"isolation_level must be one of {', '.join(levels)}, not {shown(level)}"
    if not isinstance(level, str):
        raise TypeError(known)
    if level not in levels:
        raise ValueError(known)


#: A block without options, as nearly every one is.
NO_OPTIONS = TransactionOptions()
