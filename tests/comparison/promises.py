"""The rows of docs/comparison.md: each is a program that finds out whether a stack keeps it."""

import ast
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tests.comparison.stacks import STACKS, Stack

Program = Callable[[Stack], Awaitable[bool]]


@dataclass(frozen=True)
class Promise:
    """A row: its title, its program, and the stacks that have what it is about."""

    title: str
    program: Program
    stacks: tuple[type[Stack], ...]
    #: Names that a stack would have if it had a counterpart.
    lacking: str
    #: Whether the program needs a database of its own.
    in_database: bool


PROMISES: dict[str, Promise] = {}


def promise(
    *stacks: type[Stack], lacking: str = "", in_database: bool = True
) -> Callable[[Program], Program]:
    """Make a row of a program, whose docstring is the title.

    Without `stacks` it is about all of them. Where it is about some, none of the others may have a
    function, method or class whose name matches `lacking`.
    """

    def register(program: Program) -> Program:
        title = (program.__doc__ or "").strip().rstrip(".")
        assert title and title not in PROMISES, title
        assert bool(stacks) == bool(lacking), title
        PROMISES[title] = Promise(title, program, stacks or STACKS, lacking, in_database)
        return program

    return register


@cache
def names_of(package: str) -> tuple[str, ...]:
    """The public functions, methods and classes of an installed package, with their files."""
    return tuple(_read(package))


def _read(package: str) -> Iterator[str]:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    for module in root.rglob("*.py"):
        path = module.relative_to(root)
        # SQLAlchemy's own tools, and its other databases, are no part of an application.
        if path.parts[0] in ("testing", "dialects") and package == "sqlalchemy":
            continue
        for node in ast.walk(ast.parse(module.read_text(errors="replace"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if not node.name.startswith("_"):
                    yield f"{path}: {node.name}"


def counterparts(stack: type[Stack], pattern: str) -> list[str]:
    """The names of a stack's package that match the whole pattern."""
    return [
        name
        for name in names_of(stack.package)
        if re.fullmatch(pattern, name.rpartition(": ")[2], re.IGNORECASE)
    ]
