"""What a Many-to-Many relationship is to a type checker: `Post.tags` is one, `Post.title` and
`post.tags` are none.

That a relationship has an association table is not in its type; the functions look at that before
any SQL.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

from sqlalchemy.orm import Mapped, Mapper

__all__ = ["ManyToMany", "Related"]

Related = TypeVar("Related")


class _Instance(Protocol):
    """An instance of a mapped class: of one row, or of the rows of a `WriteOnlyMapped`."""

    __mapper__: ClassVar[Mapper[Any]]


class _OtherCollection(Protocol):
    """One that is annotated as a `Sequence`, or is of a class of its own. A `str` is none: its
    items are strings.

    Lists, sets and dicts are not hashable, and so are left to what knows the class of their items.
    """

    def __hash__(self) -> int: ...

    def __iter__(self) -> Iterator[_Instance]: ...


#: With the mutable collections, which are invariant, an instance of another class than that of
#: their items is refused.
ManyToMany: TypeAlias = Mapped[
    MutableSequence[Related]
    | MutableSet[Related]
    | MutableMapping[Any, Related]
    | _OtherCollection
    | _Instance
    | None
]
