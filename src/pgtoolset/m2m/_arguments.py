"""What the caller hands in, judged before any SQL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ClauseElement
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import instance_state

from pgtoolset.m2m._associations import Association, End

Key = tuple[Any, ...]


def check_instances(
    session: Session, association: Association, end: End, instances: Sequence[Any]
) -> None:
    """Each is of the class, and has an identity or will have one after a flush of `session`."""
    class_ = end.mapper.class_
    doomed = session.deleted or ()
    for instance in instances:
        if isinstance(instance, class_):
            state: Any = instance_state(instance)
            if (
                state.key is not None
                and not state._deleted
                and (not doomed or instance not in doomed)
            ):
                continue
            if state.key is not None:
                raise ValueError(f"{association.name}: {_told(end, instance)} has been deleted")
            if state.session is None:
                raise ValueError(
                    f"{association.name}: {_told(end, instance)} is transient; add it to the session first"
                )
            if state.session is not session:
                raise ValueError(
                    f"{association.name}: {_told(end, instance)} is pending in another session; flush that first"
                )
        else:
            hint = (
                "; unpack a collection with *"
                if isinstance(instance, list | tuple | set | frozenset)
                else ""
            )
            hint = hint or (
                "" if hasattr(instance, "_sa_instance_state") else "; a primary key goes into pks"
            )
            raise TypeError(
                f"{association.name} takes instances of {end.name}, not {instance!r}{hint}"
            )


def listed(name: str, what: str, values: Iterable[Any]) -> list[Any]:
    """Any iterable as a list, but a string or a mapping."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be an iterable of {what}, not {values!r}")
    return list(values)


def check_key(association: Association, end: End, key: Any) -> Key:
    """One primary key as a tuple."""
    width = len(end.mapper.primary_key)
    if hasattr(key, "_sa_instance_state"):
        raise TypeError(
            f"{association.name}: expected {end.name} or a primary key of it, not {key!r}"
        )
    if isinstance(key, tuple | list):
        if len(key) != width:
            raise ValueError(
                f"{association.name}: a primary key of {end.name} has {_columns(end)}; {key!r} does not fit"
            )
        found = tuple(key)
    elif width > 1:
        raise ValueError(
            f"{association.name}: a primary key of {end.name} is a tuple of {_columns(end)}, not {key!r}"
        )
    else:
        found = (key,)
    for value in found:
        if value is None:
            raise ValueError(f"{association.name}: None is no primary key of {end.name}")
        if isinstance(value, Mapping | set | list):
            raise TypeError(f"{association.name}: {value!r} is no primary key of {end.name}")
    return found


def check_values(association: Association, values: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Values for extra columns, by column name."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"values must be a mapping of column names to values, not {values!r}")
    names = {column.name for column in association.extras}
    for name, value in values.items():
        if name not in names:
            raise ValueError(
                f"{association.name}: {name!r} is not among the extra columns of {association.table.name}: "
                f"{', '.join(sorted(names)) or 'it has none'}"
            )
        if isinstance(value, ClauseElement):
            raise TypeError(
                f"{association.name}: values takes values, not the SQL expression {value}"
            )
    return values


def check_links(
    session: Session, association: Association, links: Sequence[Any]
) -> list[tuple[Any, Any]]:
    """Pairs of owner and related; a key among them becomes a tuple, an instance stays."""
    checked: list[tuple[Any, Any]] = []
    owner, related = association.owner, association.related
    owner_class, related_class = owner.mapper.class_, related.mapper.class_
    for link in links:
        if not isinstance(link, tuple | list):
            raise TypeError(f"links must consist of pairs (owner, related); {link!r} is none")
        if len(link) != 2:
            raise ValueError(
                f"links must consist of pairs (owner, related); {link!r} has {len(link)} elements"
            )
        one, other = link
        if not isinstance(one, owner_class):
            one = check_key(association, owner, one)
        if not isinstance(other, related_class):
            other = check_key(association, related, other)
        checked.append((one, other))
    for end, at in ((owner, 0), (related, 1)):
        instances = {id(link[at]): link[at] for link in checked if not isinstance(link[at], tuple)}
        check_instances(session, association, end, list(instances.values()))
    return checked


def _columns(end: End) -> str:
    names = [end.mapper.get_property_by_column(column).key for column in end.mapper.primary_key]
    return f"{len(names)} column{'s' if len(names) > 1 else ''} ({', '.join(names)})"


def _told(end: End, instance: Any) -> str:
    # Not its repr, which may read attributes that are expired.
    return f"<{type(instance).__name__} at {id(instance):#x}>"
