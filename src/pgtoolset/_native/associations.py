"""The rows of an association table: instances or keys in, one list of values per key column out.

Every row of every call passes through here once, so these are flat loops over lists. Keys come from the identity that
SQLAlchemy keeps of each instance; an attribute is never read, because reading an expired one would load it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm.attributes import instance_state

if TYPE_CHECKING:
    from pgtoolset._native import _pure as cython
else:
    try:
        import cython
    except ModuleNotFoundError:
        from pgtoolset._native import _pure as cython

__all__ = ["key_columns", "pair_columns"]


def key_columns(instances: Sequence[Any], keys: Sequence[tuple[Any, ...]], positions: Sequence[int]) -> list[list[Any]]:
    """The keys of `instances`, which have identities, and then `keys`, each once; a list per position in them."""
    if len(positions) == 1:
        position = positions[0]
        single: list[Any] = [instance_state(instance).key[1][position] for instance in instances]  # type: ignore[index]
        single += [key[position] for key in keys]
        return [list(dict.fromkeys(single))]
    rows: dict[tuple[Any, ...], None] = {}
    for instance in instances:
        identity: tuple[Any, ...] = instance_state(instance).key[1]  # type: ignore[index]
        rows[tuple([identity[position] for position in positions])] = None
    for key in keys:
        rows[tuple([key[position] for position in positions])] = None
    return _columns(list(rows), len(positions))


def pair_columns(
    owners: Sequence[tuple[Any, ...]],
    related: Sequence[tuple[Any, ...]],
    owner_positions: Sequence[int],
    related_positions: Sequence[int],
) -> list[list[Any]]:
    """The pairs, each once: first a list per position in the owners' keys, then one per position in the related."""
    rows: dict[tuple[Any, ...], None] = {}
    if len(owner_positions) == 1 and len(related_positions) == 1:
        first, second = owner_positions[0], related_positions[0]
        for one, other in zip(owners, related, strict=True):
            rows[(one[first], other[second])] = None
    else:
        for one, other in zip(owners, related, strict=True):
            pair = [one[position] for position in owner_positions]
            pair += [other[position] for position in related_positions]
            rows[tuple(pair)] = None
    return _columns(list(rows), len(owner_positions) + len(related_positions))


@cython.cfunc
def _columns(rows: list[tuple[Any, ...]], width: int) -> list[list[Any]]:
    return [[row[position] for row in rows] for position in range(width)]
