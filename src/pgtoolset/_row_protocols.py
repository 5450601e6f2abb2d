"""The contracts of the two modules that can be compiled: `pgtoolset.protocols` exports them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

__all__ = ["AssociationRows", "RowComparator"]


class RowComparator(Protocol):
    """Finds the rows that differ between two looks. Internal: a stateless module."""

    def changed_lines(self, before: bytes, after: bytes) -> tuple[list[bytes], list[bytes]]:
        """Return the lines that only `before` has, and the lines that only `after` has."""
        ...

    def changed_rows(
        self, rows: Sequence[Sequence[Any]], known: Mapping[Any, Sequence[Any]], width: int
    ) -> list[int]:
        """Return the positions of the rows that differ from the row in `known` with their key.

        Args:
            rows: the rows of a look. The first values are the key, the last is the row as text.
            known: the rows of the look before, by key.
            width: the number of values of a key.
        """
        ...

    def same_value(self, left: Any, right: Any) -> bool:
        """Whether two values are the same. NaN equals NaN; an `__eq__` that fails is no change."""
        ...


class AssociationRows(Protocol):
    """Turns instances and keys into columns of association rows. Internal: a stateless module.

    Both functions return the position of the first item that they cannot read with certainty as a
    key or as an instance with an identity. The caller then examines that item.
    """

    def key_columns(
        self,
        class_: type[Any],
        instances: Sequence[Any],
        keys: Sequence[Any],
        width: int,
        positions: Sequence[int],
    ) -> list[list[Any]] | int:
        """Return the keys of `instances`, then `keys`, without duplicates, by column.

        Args:
            class_: the class of the instances.
            instances: instances with an identity.
            keys: scalars, or tuples of `width` values.
            width: the number of columns of a key.
            positions: the columns of the key that are wanted: one list for each.
        """
        ...

    def pair_columns(
        self,
        classes: tuple[type[Any], type[Any]],
        links: Sequence[Any],
        widths: tuple[int, int],
        positions: tuple[Sequence[int], Sequence[int]],
    ) -> list[list[Any]] | int:
        """Return pairs of owner and related, without duplicates, by column.

        Args:
            classes: the class of the owner and of the related.
            links: the pairs, each of the two an instance or a key.
            widths: the number of columns of either key.
            positions: the columns of either key that are wanted: one list for each.
        """
        ...

    def are_integers(self, values: Collection[Any], lowest: int, highest: int) -> bool:
        """Return whether each value is an `int`, of no subclass, within the bounds.

        Args:
            values: values of any types.
            lowest: a number of 64 bits.
            highest: another one.
        """
        ...
