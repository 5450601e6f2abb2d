"""Relationships for the contract of Many-to-Many writes."""

from __future__ import annotations

from typing import Any

from pgtoolset.testing import MemoryDatabase
from pgtoolset.testing.contracts import LinkedRows, MemoryLinks
from tests.m2m import models


def shape_of(name: str) -> tuple[Any, Any, Any, str]:
    """A relationship of tests/m2m/models.py, what makes owner and related, and the reverse."""
    shapes: dict[str, tuple[Any, Any, Any, str]] = {
        "plain": (
            models.Post.tags,
            lambda n: models.Post(id=n),
            lambda n: models.Tag(key=n),
            "posts",
        ),
        "composite": (
            models.CompositeA.bs,
            lambda n: models.CompositeA(two=n, one=10 - n),
            lambda n: models.CompositeB(number=n, text=f"t{n}"),
            "as_",
        ),
        "self-referential": (
            models.Person.follows,
            lambda n: models.Person(id=n),
            lambda n: models.Person(id=10 + n),
            "followers",
        ),
        "extra columns": (
            models.Box.things,
            lambda n: models.Box(id=n),
            lambda n: models.Thing(id=n),
            "boxes",
        ),
        "unique column": (
            models.User.groups,
            lambda n: models.User(id=n, mail=f"u{n}"),
            lambda n: models.Group(id=n, name=f"g{n}"),
            "users",
        ),
        "joined inheritance": (
            models.Car.drivers,
            lambda n: models.Taxi(car_id=n, id=n),
            lambda n: models.Driver(id=n),
            "cars",
        ),
    }
    return shapes[name]


def linked(session_maker: Any, shape: str) -> LinkedRows:
    """The harness for sessions of PostgreSQL."""
    relationship, owner, related, reverse = shape_of(shape)
    values = {"note": "n", "payload": {"a": 1}} if shape == "extra columns" else None
    return LinkedRows(session_maker, relationship, owner, related, reverse=reverse, values=values)


def memory_linked(database: MemoryDatabase, shape: str) -> MemoryLinks:
    """The harness for sessions of the double."""
    relationship, owner, related, _ = shape_of(shape)
    return MemoryLinks(database, relationship, owner, related)


SHAPES = [
    "plain",
    "composite",
    "self-referential",
    "extra columns",
    "unique column",
    "joined inheritance",
]

#: The doubles refuse a relationship that refers to another column than the primary key.
MEMORY_SHAPES = [shape for shape in SHAPES if shape != "unique column"]
