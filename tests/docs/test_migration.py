"""The tables of docs/migrating-from-fastapi-toolsets.md: every name of both versions, and true."""

from __future__ import annotations

import builtins
import inspect
import json
import re
import zipfile
from pathlib import Path

import fastapi
import pytest
import sqlalchemy.exc
import sqlalchemy.ext.asyncio
import sqlalchemy.orm

import pgtoolset
import pgtoolset.fastapi
import pytest_pgtoolset
from pgtoolset import testing
from tests.docs.peer_names import LISTS, Names, names_of

#: The same on every version.
pytestmark = pytest.mark.once

PAGE = Path(__file__).parents[2] / "docs" / "migrating-from-fastapi-toolsets.md"
VERSIONS = {"3.1.1": "3", "6.0.2": "6"}
ROW = re.compile(r"^\| (?P<names>`[^|]+`) \| (?P<versions>3, 6|3|6) \| (?P<here>[^|]+) \|$", re.M)
CODE = re.compile(r"`([^`]+)`")
#: `name`, `name(...)`, `parameter=` or `parameter=value`.
CALL = re.compile(r"(?P<name>[A-Za-z_][\w.]*)(?:\(.*\))?")
PARAMETER = re.compile(r"(?P<name>[a-z_]+)=.*")

OURS = (pgtoolset, testing, pgtoolset.fastapi)
OTHERS = (builtins, fastapi, sqlalchemy.exc, sqlalchemy.ext.asyncio, sqlalchemy.orm)


def rows() -> list[re.Match[str]]:
    return list(ROW.finditer(PAGE.read_text()))


def table() -> dict[str, set[str]]:
    """Each name of the page, with the versions in which the tables say that it is."""
    names: dict[str, set[str]] = {}
    for row in rows():
        for name in CODE.findall(row["names"]):
            names.setdefault(name, set()).update(row["versions"].split(", "))
    return names


def expected() -> dict[str, set[str]]:
    """The same, from the lists."""
    lists: Names = json.loads(LISTS.read_text())
    assert set(lists) == set(VERSIONS)
    names: dict[str, set[str]] = {}
    for version, parts in lists.items():
        for name in {name for part in parts.values() for name in part}:
            names.setdefault(name, set()).add(VERSIONS[version])
    return names


def test_every_name() -> None:
    """The tables have every public name of both versions, no other, and say which has it."""
    assert table() == expected()


@pytest.mark.parametrize("part", ["db", "pytest", "exceptions"])
def test_every_part(part: str) -> None:
    """The section of a part has all of its names, also those that another part has too."""
    section = PAGE.read_text().partition(f": `fastapi_toolsets.{part}`\n")[2].partition("\n#")[0]
    listed = {name for row in ROW.finditer(section) for name in CODE.findall(row["names"])}
    lists: Names = json.loads(LISTS.read_text())
    assert listed == {name for parts in lists.values() for name in parts[part]}


def names_and_parameters(here: str) -> tuple[list[str], list[str]]:
    names, parameters = [], []
    for code in CODE.findall(here):
        if match := PARAMETER.fullmatch(code):
            parameters.append(match["name"])
        elif match := CALL.fullmatch(code):
            names.append(match["name"])
    return names, parameters


def exists(name: str) -> bool:
    """Whether a name is one of ours, a fixture, or one of SQLAlchemy, FastAPI and Python."""
    first, *rest = name.split(".")
    if first.startswith("pg_"):
        return hasattr(pytest_pgtoolset, first)
    for module in (*OURS, *OTHERS):
        if module in OTHERS or first in module.__all__:
            found = getattr(module, first, None)
            for attribute in rest:
                found = getattr(found, attribute, None)
            if found is not None:
                return True
    return False


@pytest.mark.parametrize("row", rows(), ids=lambda row: CODE.findall(row["names"])[0])
def test_here(row: re.Match[str]) -> None:
    """Each name of the last column exists, and each parameter belongs to a function of the row."""
    names, parameters = names_and_parameters(row["here"])
    assert [name for name in names if not exists(name)] == []
    assert names or "no counterpart" in row["here"] or "keep it" in row["here"]
    functions = [
        getattr(module, name)
        for name in [*names, *CODE.findall(row["names"])]
        for module in OURS
        if inspect.isfunction(getattr(module, name, None))
    ]
    known = {
        parameter for function in functions for parameter in inspect.signature(function).parameters
    }
    assert set(parameters) - known <= {"session_fixture"}


def test_names_are_read(tmp_path: Path) -> None:
    """The lists have what `__all__` says, what a module without it defines, and methods."""
    wheel = tmp_path / "fastapi_toolsets-9.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fastapi_toolsets/__init__.py", "")
        archive.writestr("fastapi_toolsets/_private.py", "def hidden(): ...")
        archive.writestr("fastapi_toolsets/types.py", "A = 1\n_B = 2\nclass C: ...")
        archive.writestr("fastapi_toolsets/db/__init__.py", "__all__ = ['Database', 'lock']")
        archive.writestr(
            "fastapi_toolsets/db/core.py",
            "class Database:\n def install(self): ...\ndef inner(): ...",
        )
        archive.writestr("fastapi_toolsets/db/testing.py", "async def cleanup(): ...")
    assert names_of(wheel) == {
        "db": ["Database", "Database.install", "cleanup", "lock"],
        "types": ["A", "C"],
    }
