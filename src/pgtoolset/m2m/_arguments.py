"""What only these functions take, checked before any SQL: instances, values and links."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ClauseElement
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import instance_state

from pgtoolset._arguments import shown
from pgtoolset._text import printable
from pgtoolset.m2m._associations import Association, End


def check_instances(session: Session, name: str, end: End, instances: Iterable[Any]) -> None:
    """Raise unless each is of the class, and has an identity or gets one by a flush of `session`.

    Args:
        session: the session that will be flushed.
        name: the argument, for messages.
        end: the end whose instances these are to be.
        instances: what the caller gave.
    """
    class_ = end.mapper.class_
    deleted = session.deleted or ()
    for instance in instances:
        if not isinstance(instance, class_):
            raise TypeError(
                f"{name} must be an instance of {end.name}, not {shown(instance)}"
                f"{_advice(name, instance)}"
            )
        state: Any = instance_state(instance)
        if state.key is None:
            _check_pending(session, name, end, state)
        elif state._deleted or (deleted and instance in deleted):
            raise ValueError(f"{name}: this instance of {end.name} has been deleted")


def _check_pending(session: Session, name: str, end: End, state: Any) -> None:
    """Raise `ValueError` for an instance without an identity that `session` will not flush."""
    if state.session is None:
        raise ValueError(
            f"{name}: this instance of {end.name} is transient; add it to the session first"
        )
    if state.session is not session:
        raise ValueError(
            f"{name}: this instance of {end.name} is pending in another session; flush that first"
        )


def _advice(name: str, given: Any) -> str:
    """What to pass in place of something that is not an instance."""
    if isinstance(given, list | tuple | set | frozenset):
        return "; unpack a collection with *"
    if name == "related" and not hasattr(given, "_sa_instance_state"):
        return "; a primary key goes into pks"
    return ""


def check_values(association: Association, values: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the values for extra columns, by column name."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"values must be a mapping of column names to values, not {shown(values)}")
    names = {column.name for column in association.extras}
    for name, value in values.items():
        if name not in names:
            known = printable(", ".join(sorted(names))) or "there are no extra columns"
            raise ValueError(
                f"values: {shown(name)} is not an extra column of the association table "
                f"{printable(association.table.name)}: {known}"
            )
        if isinstance(value, ClauseElement):
            raise TypeError(f"values: {printable(name)} must be a value, not an SQL expression")
    return values


def check_links(
    session: Session, association: Association, links: Sequence[Any]
) -> list[tuple[Any, Any]]:
    """Return the pairs of owner and related: instances as they are, keys as parsed tuples."""
    owner, related = association.owner, association.related
    checked = [
        (_instance_or_key(owner, one), _instance_or_key(related, other))
        for one, other in map(_check_link, links)
    ]
    for position, end in enumerate((owner, related)):
        instances = (link[position] for link in checked if not isinstance(link[position], tuple))
        check_instances(session, "links", end, instances)
    return checked


def _check_link(link: Any) -> Sequence[Any]:
    if not isinstance(link, tuple | list):
        raise TypeError(f"links must hold pairs (owner, related), not {shown(link)}")
    if len(link) != 2:
        raise ValueError(
            f"links must hold pairs (owner, related); {shown(link)} has {len(link)} elements"
        )
    return link


def _instance_or_key(end: End, given: Any) -> Any:
    if isinstance(given, end.mapper.class_):
        return given
    if hasattr(given, "_sa_instance_state"):
        raise TypeError(
            f"links: expected an instance or a primary key of {end.name}, not {shown(given)}"
        )
    return end.parser.parse("links", given)
