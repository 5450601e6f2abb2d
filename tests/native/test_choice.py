"""The implementation in use: chosen at import, forced by PGTOOLSET_IMPL."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import pgtoolset
from pgtoolset import _native

#: The first lines of a program: they make the compiled modules missing, half missing, broken or
#: present, whatever is installed.
MISSING = """
import sys
sys.modules["pgtoolset._native.comparator_c"] = None
sys.modules["pgtoolset._native.associations_c"] = None
"""
HALF = """
import sys, types
sys.modules["pgtoolset._native.associations_c"] = None
sys.modules["pgtoolset._native.comparator_c"] = types.ModuleType("pgtoolset._native.comparator_c")
"""
BROKEN = """
import sys
class Finder:
    def find_spec(name, *_):
        if name.endswith("_c"):
            raise ImportError("undefined symbol")
sys.meta_path.insert(0, Finder)
"""
PRESENT = """
import sys, types
for name in ("pgtoolset._native.comparator_c", "pgtoolset._native.associations_c"):
    sys.modules[name] = types.ModuleType(name)
"""
PRINT = """
import pgtoolset
from pgtoolset import _native
print(pgtoolset.implementation, _native.row_comparator.__name__, _native.association_rows.__name__)
"""


def run(prelude: str, forced: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PGTOOLSET_IMPL"}
    if forced is not None:
        environment["PGTOOLSET_IMPL"] = forced
    program = f"{prelude}\n{PRINT}"
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


PYTHON = "python pgtoolset._native.comparator pgtoolset._native.associations"
C = "c pgtoolset._native.comparator_c pgtoolset._native.associations_c"


@pytest.mark.parametrize(
    ("prelude", "forced", "printed"),
    [
        (PRESENT, None, C),
        (PRESENT, "", C),
        (PRESENT, "c", C),
        (PRESENT, "python", PYTHON),
        (MISSING, None, PYTHON),
        (MISSING, "", PYTHON),
        (MISSING, "python", PYTHON),
        (HALF, None, PYTHON),
        (BROKEN, None, PYTHON),
    ],
)
def test_choice(prelude: str, forced: str | None, printed: str) -> None:
    """Compiled where both modules can be imported, else interpreted; PGTOOLSET_IMPL forces one."""
    result = run(prelude, forced)
    assert (result.returncode, result.stdout.strip()) == (0, printed), result.stderr


@pytest.mark.parametrize("prelude", [MISSING, HALF, BROKEN])
def test_forced_but_missing(prelude: str) -> None:
    """Forcing a missing implementation is an ImportError that says what to do."""
    result = run(prelude, "c")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: PGTOOLSET_IMPL=c, but the compiled modules of pgtoolset cannot be imported: "
    )
    assert "_c" in last or "undefined symbol" in last
    assert "unset PGTOOLSET_IMPL" in last


@pytest.mark.parametrize("value", ["C", "pypy", "1", " "])
def test_forced_to_nonsense(value: str) -> None:
    """A value that is neither is an ImportError that names both, whatever is installed."""
    result = run(PRESENT, value)
    assert result.returncode == 1
    assert (
        f"ImportError: PGTOOLSET_IMPL must be 'c' or 'python', or not be set; it is {value!r}"
        in result.stderr
    )


def test_this_run() -> None:
    """This run tests the forced implementation, and both modules are of the same one."""
    forced = os.environ.get("PGTOOLSET_IMPL")
    assert pgtoolset.implementation == _native.implementation
    assert not forced or pgtoolset.implementation == forced
    suffix = "_c" if pgtoolset.implementation == "c" else ""
    assert _native.row_comparator.__name__ == f"pgtoolset._native.comparator{suffix}"  # type: ignore[attr-defined]
    assert _native.association_rows.__name__ == f"pgtoolset._native.associations{suffix}"  # type: ignore[attr-defined]
