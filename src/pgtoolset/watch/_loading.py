"""A row loaded beside the caller's session, and placed into it without touching what the caller has not flushed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection, Engine, select
from sqlalchemy import inspect as inspect_instance
from sqlalchemy.orm import MANYTOONE, Session, lazyload, undefer
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.base import NO_VALUE
from sqlalchemy.pool import QueuePool

from pgtoolset._native import row_comparator
from pgtoolset._postgres.connections import has_one_backend
from pgtoolset.watch.targets import Target

__all__ = ["Look", "look", "place", "seen_by", "values_of"]


class Look:
    """Where to look: the row, and what its session is bound to."""

    def __init__(self, target: Target[Any], parts: tuple[Any, ...], bind: Engine | Connection) -> None:
        self.bind = bind
        self.is_single = isinstance(bind, Connection)
        pool = bind.pool if isinstance(bind, Engine) else None
        self.pool_timeout = pool.timeout() if isinstance(pool, QueuePool) else 0.0
        keys = zip(target.keys, parts, strict=True)
        self.statement = (
            select(target.model)
            .where(*(getattr(target.model, name) == part for name, part in keys))
            .options(lazyload("*"), *(undefer(getattr(target.model, name)) for name in target.columns))
        )


def look(spot: Look, connected: Callable[[Connection], None]) -> Any:
    """The row as a detached instance, or `None`. Runs in SQLAlchemy's greenlet; `connected` is called on the way."""
    if isinstance(spot.bind, Engine):
        with spot.bind.connect() as connection:
            connected(connection)
            # A snapshot of this moment, where it can be with neither BEGIN nor ROLLBACK on the wire.
            level: Any = "AUTOCOMMIT" if has_one_backend(connection) else "READ COMMITTED"
            return _load(spot, connection.execution_options(isolation_level=level))
    if spot.bind.in_transaction():
        return _load(spot, spot.bind)
    with spot.bind.begin():
        return _load(spot, spot.bind)


def _load(spot: Look, connection: Connection) -> Any:
    # This session only reads, and must end nothing that it has not begun: its `close` leaves the transaction alone.
    with Session(connection, join_transaction_mode="rollback_only", autoflush=False) as session:
        row = session.scalars(spot.statement).one_or_none()
        if row is not None:
            session.expunge(row)
        return row


def values_of(target: Target[Any], row: Any) -> dict[str, Any]:
    """The watched values of a row that `look` has found."""
    loaded = inspect_instance(row).dict
    return {name: loaded[name] for name in target.columns if name in loaded}


def seen_by(target: Target[Any], baseline: Any) -> dict[str, Any]:
    """The watched values that the caller has seen; one that is not among them is taken from the first look."""
    if isinstance(baseline, Mapping):
        unknown = [str(name) for name in baseline if name not in target.mapper.column_attrs]
        if unknown:
            raise ValueError(f"baseline names what {target} does not map to a column: {', '.join(unknown)}")
        seen = {name: baseline[name] for name in target.columns if name in baseline}
    elif isinstance(baseline, target.model):
        state = inspect_instance(baseline)
        # An unflushed change was made by the caller; what the database had before it is what was seen.
        seen = {
            name: state.committed_state.get(name, state.dict[name])
            for name in target.columns
            if name in state.dict and state.committed_state.get(name) is not NO_VALUE
        }
    else:
        raise TypeError(f"baseline must be an instance of {target} or a mapping, not {baseline!r}")
    if not seen:
        raise ValueError(
            f"baseline has none of the watched columns ({', '.join(target.columns)}); an expired instance has lost "
            "its values"
        )
    return seen


def place(session: Session, target: Target[Any], found: Any) -> Any:
    """The caller's instance of the row, with the values of `found`. Sends no SQL; runs in SQLAlchemy's greenlet."""
    mapper = inspect_instance(found).mapper
    present = session.identity_map.get(mapper.identity_key_from_instance(found))
    if present is None:
        return session.merge(found, load=False)
    state = inspect_instance(present)
    values = {name: value for name, value in inspect_instance(found).dict.items() if name in mapper.column_attrs}
    pending = {name for name in values if name in state.committed_state}
    version = mapper.version_id_col
    if pending and version is not None:
        # What is pending was decided on the old version, and its flush has to find that out.
        pending.add(mapper.get_property_by_column(version).key)
    changed = {
        name
        for name, value in values.items()
        if name not in pending and not row_comparator.same_value(state.dict.get(name), value)
    }
    for name in values.keys() - pending:
        set_committed_value(present, name, values[name])
    stale = [
        relation.key
        for relation in mapper.relationships
        if relation.direction is MANYTOONE and relation.key in state.dict and relation.key not in state.committed_state
        if any(mapper.get_property_by_column(column).key in changed for column in relation.local_columns)
    ]
    if stale:
        session.expire(present, stale)
    return present
