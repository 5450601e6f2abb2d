"""Keys as columns: out of instances and of what the caller gave as keys, without a lazy load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pgtoolset._arguments import PrimaryKey, shown
from pgtoolset._text import printable
from pgtoolset.m2m._associations import Association, End


def identities(items: Iterable[Any]) -> list[PrimaryKey]:
    """Return the key of each: of an instance its identity; a key may lack the tuple around it."""
    found = []
    for item in items:
        state: Any = getattr(item, "_sa_instance_state", None)
        if state is not None:
            found.append(state.key[1])
        else:
            found.append(item if isinstance(item, tuple) else (item,))
    return found


def divided(end: End, items: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Return the instances among `items`, and the keys."""
    class_ = end.mapper.class_
    instances: list[Any] = []
    keys: list[Any] = []
    for item in items:
        # `isinstance` with a mapped class is slow, and most keys are integers.
        is_key = type(item) is int or not isinstance(item, class_)
        (keys if is_key else instances).append(item)
    return instances, keys


def columns_of(rows: Iterable[Sequence[Any]], positions: Sequence[int]) -> list[list[Any]]:
    """Return a list of values for each of `positions` in the rows, which are taken once each."""
    wanted = (tuple([_hashable(row[position]) for position in positions]) for row in rows)
    once = list(dict.fromkeys(wanted))
    return [[row[at] for row in once] for at in range(len(positions))]


def _hashable(value: Any) -> Any:
    """An array as tuples: a list cannot be compared in a set."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def check_shared(
    name: str, association: Association, owner: Sequence[Any], related: Sequence[Sequence[Any]]
) -> None:
    """Raise `ValueError` unless owner and related have one value in a column that both keys have.

    Args:
        name: the argument that has the related rows, for messages.
        association: the relationship.
        owner: for each column of the owner's key one value, or a list of one per row.
        related: for each column of the related key a list of one per row.
    """
    for position, at in association.shared.items():
        owners = owner[at] if isinstance(owner[at], list) else [owner[at]] * len(related[position])
        for one, other in zip(owners, related[position], strict=True):
            if one != other:
                raise ValueError(
                    f"{name}: owner and related share the column "
                    f"{printable(association.owner.columns[at].name)} of "
                    f"{printable(association.table.name)}, but the "
                    f"owner has {shown(one)} and the related row has {shown(other)}"
                )
