"""Relationships for the contract of Many-to-Many writes."""

from __future__ import annotations

from typing import Any

from pgtoolset.testing.contracts import LinkedRows
from tests.m2m import models


def linked(session_maker: Any, shape: str) -> LinkedRows:
    """Mappings of tests/m2m/models.py: plain, composite keys, self-reference, extra columns, a
    unique column."""
    one_of = {
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
    relationship, owner, related, reverse = one_of[shape]
    values = {"note": "n", "payload": {"a": 1}} if shape == "extra columns" else None
    return LinkedRows(session_maker, relationship, owner, related, reverse=reverse, values=values)


SHAPES = [
    "plain",
    "composite",
    "self-referential",
    "extra columns",
    "unique column",
    "joined inheritance",
]
