"""The values of a row: the ones that the caller has seen, and new ones for its session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Column
from sqlalchemy import inspect as inspect_instance
from sqlalchemy.orm import (
    MANYTOONE,
    InstanceState,
    Mapper,
    Session,
    make_transient_to_detached,
)
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.base import NO_VALUE

from pgtoolset._arguments import shown
from pgtoolset._native import row_comparator
from pgtoolset._text import printable
from pgtoolset.watch.targets import Target

__all__ = ["detached", "place", "seen_by", "values_of"]


def values_of(target: Target[Any], row: Any) -> dict[str, Any]:
    """Return the watched values of a row that a poll has found."""
    loaded = inspect_instance(row).dict
    return {name: loaded[name] for name in target.columns if name in loaded}


def seen_by(target: Target[Any], baseline: Any) -> dict[str, Any]:
    """Return the watched values that the argument `baseline` holds.

    Raises:
        TypeError: `baseline` is neither an instance of the model nor a mapping.
        ValueError: it names an unknown column, or lacks every watched column.
    """
    if isinstance(baseline, Mapping):
        seen = _seen_in_mapping(target, baseline)
    elif isinstance(baseline, target.model):
        seen = _seen_in_instance(target, baseline)
    else:
        raise TypeError(
            f"baseline must be an instance of {target} or a mapping of attribute names to values, "
            f"not {shown(baseline)}"
        )
    if not seen:
        raise ValueError(
            f"baseline lacks every watched column ({printable(', '.join(target.columns))}); "
            "an expired instance has lost its values: refresh it, or pass a mapping"
        )
    return seen


def _seen_in_mapping(target: Target[Any], baseline: Mapping[Any, Any]) -> dict[str, Any]:
    unknown = [shown(name) for name in baseline if name not in target.mapper.column_attrs]
    if unknown:
        known = printable(", ".join(sorted(target.mapper.column_attrs.keys())))
        raise ValueError(
            f"baseline: {target} has no mapped column {', '.join(unknown)}; it has {known}"
        )
    return {name: baseline[name] for name in target.columns if name in baseline}


def _seen_in_instance(target: Target[Any], baseline: Any) -> dict[str, Any]:
    state = inspect_instance(baseline)
    # The caller made an unflushed change itself, so it has seen the value before the change.
    # `committed_state` has that value; it is NO_VALUE where the attribute was not loaded.
    return {
        name: state.committed_state.get(name, state.dict[name])
        for name in target.columns
        if name in state.dict and state.committed_state.get(name) is not NO_VALUE
    }


def detached(target: Target[Any], values: Mapping[str, Any]) -> Any:
    """Return a detached instance with the values of a row, of the subclass that the row is of."""
    mapper: Mapper[Any] = target.mapper
    discriminator = mapper.polymorphic_on
    if isinstance(discriminator, Column) and mapper.columns.contains_column(discriminator):
        name = mapper.get_property_by_column(discriminator).key
        mapper = mapper.polymorphic_map.get(values[name], mapper)
    instance = mapper.class_manager.new_instance()
    for name, value in values.items():
        set_committed_value(instance, name, value)
    make_transient_to_detached(instance)
    return instance


def place(session: Session, target: Target[Any], found: Any) -> Any:
    """Return the session's instance of a row, with the values of `found`, a detached instance.

    Attributes with unflushed changes keep them. Sends no SQL; runs in SQLAlchemy's greenlet.
    """
    mapper: Mapper[Any] = inspect_instance(found).mapper
    present = session.identity_map.get(mapper.identity_key_from_instance(found))
    if present is None:
        return session.merge(found, load=False)
    state = inspect_instance(present)
    values = {
        name: value
        for name, value in inspect_instance(found).dict.items()
        if name in mapper.column_attrs
    }
    pending = _pending(mapper, state, values)
    changed = {
        name
        for name, value in values.items()
        if name not in pending and not row_comparator.same_value(state.dict.get(name), value)
    }
    for name in values.keys() - pending:
        set_committed_value(present, name, values[name])
    stale = _stale_relationships(mapper, state, changed)
    if stale:
        session.expire(present, stale)
    return present


def _pending(mapper: Mapper[Any], state: InstanceState[Any], values: Mapping[str, Any]) -> set[str]:
    """Return the attributes with unflushed changes, which must keep them."""
    pending = {name for name in values if name in state.committed_state}
    version = mapper.version_id_col
    if pending and version is not None:
        # The caller decided on its change with the old version of the row before it. The flush has
        # to find out that the row has a newer one.
        pending.add(mapper.get_property_by_column(version).key)
    return pending


def _stale_relationships(
    mapper: Mapper[Any], state: InstanceState[Any], changed: set[str]
) -> list[str]:
    """Return the loaded many-to-one relationships whose foreign key has changed."""
    return [
        relation.key
        for relation in mapper.relationships
        if relation.direction is MANYTOONE
        and relation.key in state.dict
        and relation.key not in state.committed_state
        and any(
            mapper.get_property_by_column(column).key in changed
            for column in relation.local_columns
        )
    ]
