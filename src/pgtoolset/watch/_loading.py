"""What a look has found: compared with what was seen, and placed into the caller's session beside
its pending work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import inspect as inspect_instance
from sqlalchemy.orm import MANYTOONE, Session
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.base import NO_VALUE

from pgtoolset._native import row_comparator
from pgtoolset.watch.targets import Target

__all__ = ["place", "seen_by", "values_of"]


def values_of(target: Target[Any], row: Any) -> dict[str, Any]:
    """The watched values of a row that a look has found."""
    loaded = inspect_instance(row).dict
    return {name: loaded[name] for name in target.columns if name in loaded}


def seen_by(target: Target[Any], baseline: Any) -> dict[str, Any]:
    """The watched values that the caller has seen; one that is not among them is taken from the
    first look."""
    if isinstance(baseline, Mapping):
        unknown = [str(name) for name in baseline if name not in target.mapper.column_attrs]
        if unknown:
            raise ValueError(
                f"baseline names what {target} does not map to a column: {', '.join(unknown)}"
            )
        seen = {name: baseline[name] for name in target.columns if name in baseline}
    elif isinstance(baseline, target.model):
        state = inspect_instance(baseline)
        # An unflushed change was made by the caller; what the database had before it is what was
        # seen.
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
    """The caller's instance of the row, with the values of `found`. Sends no SQL; runs in
    SQLAlchemy's greenlet."""
    mapper = inspect_instance(found).mapper
    present = session.identity_map.get(mapper.identity_key_from_instance(found))
    if present is None:
        return session.merge(found, load=False)
    state = inspect_instance(present)
    values = {
        name: value
        for name, value in inspect_instance(found).dict.items()
        if name in mapper.column_attrs
    }
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
        if relation.direction is MANYTOONE
        and relation.key in state.dict
        and relation.key not in state.committed_state
        if any(
            mapper.get_property_by_column(column).key in changed
            for column in relation.local_columns
        )
    ]
    if stale:
        session.expire(present, stale)
    return present
