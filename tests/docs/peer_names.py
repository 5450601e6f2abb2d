"""The public names of fastapi-toolsets, read from its source without importing it.

`peer_names.json` is made with this module, once for each version that the page
`docs/migrating-from-fastapi-toolsets.md` is about:

    pip download --no-deps --dest build/peers fastapi-toolsets==6.0.2
    python -m tests.docs.peer_names build/peers/fastapi_toolsets-6.0.2-py3-none-any.whl

A wheel is read as it is. The entry of its version is replaced, and the others stay.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path, PurePosixPath

LISTS = Path(__file__).with_suffix(".json")

#: Version to part of the package to names: `{"6.0.2": {"db": ["Database", ...]}}`.
Names = dict[str, dict[str, list[str]]]

#: Classes whose methods are names of their own in the lists.
FACADES = {"Database"}


def declared(tree: ast.Module) -> list[str] | None:
    """Return `__all__` of a module, or `None` where it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            return list(ast.literal_eval(node.value))
    return None


def defined(tree: ast.Module) -> list[str]:
    """Return the public classes, functions and constants that a module defines."""
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_")]


def methods(tree: ast.Module) -> list[str]:
    """Return the public methods of the facades of a module."""
    return [
        f"{cls.name}.{method.name}"
        for cls in tree.body
        if isinstance(cls, ast.ClassDef) and cls.name in FACADES
        for method in cls.body
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
        and not method.name.startswith("_")
    ]


def names_of(wheel: Path) -> dict[str, list[str]]:
    """Return the names of each part of the package: `db`, `crud`, `pytest` and so on.

    A module without `__all__` counts with all that it defines, unless its package has an
    `__all__`, which then says what is public; `db.testing` is documented by its own name.
    """
    modules: dict[tuple[str, ...], ast.Module] = {}
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.namelist():
            path = PurePosixPath(entry)
            if path.suffix == ".py" and path.parts[0] == "fastapi_toolsets":
                parts = path.with_suffix("").parts[1:]
                parts = parts[:-1] if parts[-1] == "__init__" else parts
                modules[parts] = ast.parse(archive.read(entry))
    found: dict[str, set[str]] = {}
    for parts, tree in modules.items():
        if not parts or any(part.startswith("_") for part in parts):
            continue
        names = declared(tree)
        covered = len(parts) > 1 and declared(modules[parts[:1]]) is not None
        if names is None:
            names = [] if covered and parts != ("db", "testing") else defined(tree)
        found.setdefault(parts[0], set()).update(names, methods(tree))
    return {part: sorted(names) for part, names in sorted(found.items()) if names}


def main(wheels: list[str]) -> None:
    """Put the names of each wheel into the lists."""
    lists: Names = json.loads(LISTS.read_text()) if LISTS.exists() else {}
    for wheel in wheels:
        lists[Path(wheel).name.split("-")[1]] = names_of(Path(wheel))
    LISTS.write_text(json.dumps(lists, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
