"""Faults that only compiled code can have: references and threads."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import sysconfig
import threading
import tracemalloc
from types import ModuleType
from typing import Any

import pytest

from pgtoolset.protocols import AssociationRows, RowComparator


class State:
    def __init__(self, key: Any) -> None:
        self.key = key
        self._deleted = False


class Instance:
    def __init__(self, number: int) -> None:
        self._sa_instance_state = State((Instance, (number,), None))


#: Interpreted code is here for comparison, and takes ten times as long.
IS_COMPILED = importlib.util.find_spec("pgtoolset._native.comparator_c") is not None
ROWS = 10_000 if IS_COMPILED else 1_000
INSTANCES = [Instance(number + 1_000_000) for number in range(ROWS)]
KEYS = list(range(2_000_000, 2_000_000 + ROWS))
BEFORE = [b"(%d,new)" % number for number in range(ROWS)]
AFTER = [line if number % 10 else line + b"!" for number, line in enumerate(BEFORE)]
SHUFFLED = BEFORE[::-1]
KNOWN = {number: (number, [number + 0.5], b"text") for number in range(ROWS)}
NEXT = [(number, [number + 0.5], b"text" if number % 10 else None) for number in range(ROWS)]


def everything(comparator: RowComparator, associations: AssociationRows) -> list[Any]:
    """Every function on many rows, errors and doubtful items included."""
    one, both = ((0,), (1, 1)), (Instance, Instance)
    results: list[Any] = [
        associations.key_columns(Instance, INSTANCES, KEYS, 1, (0,)),
        associations.key_columns(Instance, [*INSTANCES, None], (), 1, (0,)),
        associations.pair_columns(
            both, list(zip(INSTANCES, KEYS, strict=True)), (1, 1), ((0,), (0,))
        ),
        comparator.changed_lines(b"\n".join(BEFORE), b"\n".join(AFTER)),
        comparator.changed_lines(b"\n".join(BEFORE), b"\n".join(SHUFFLED)),
        comparator.changed_rows(NEXT, KNOWN, 1),
        comparator.same_value({"a": [float("nan")]}, {"a": [float("nan")]}),
        one,
    ]
    for wrong in (
        lambda: associations.key_columns(Instance, [object.__new__(Instance)], (), 1, (0,)),
        lambda: associations.key_columns(Instance, INSTANCES, (), 1, (7,)),
        lambda: comparator.changed_rows([()], KNOWN, 1),
        lambda: comparator.changed_lines(b"a", "b"),  # type: ignore[arg-type]
    ):
        with pytest.raises((AttributeError, IndexError, TypeError)):
            wrong()
    return results


def test_nothing_leaks(comparator: RowComparator, associations: AssociationRows) -> None:
    """After many rows no object has more or fewer references, and no memory is lost."""
    watched: list[Any] = [*INSTANCES[:50], *KEYS[:50], *BEFORE[:50], *KNOWN.values(), *NEXT[:50]]
    watched += [instance._sa_instance_state.key for instance in INSTANCES[:50]]
    everything(comparator, associations)
    gc.collect()
    gc.freeze()  # what has lived until now is not to be visited again
    counts = [sys.getrefcount(each) for each in watched]
    tracemalloc.start()
    try:
        grown = [_growth(comparator, associations) for _ in range(3)]
    finally:
        tracemalloc.stop()
    assert [sys.getrefcount(each) for each in watched] == counts
    # Something else in the process may keep what it allocates just then; a leak grows every time.
    assert min(grown) < 2 * ROWS


def _growth(comparator: RowComparator, associations: AssociationRows) -> int:
    """The growth of memory in bytes over fifty times `ROWS` rows."""
    before: int | None = None
    for _ in range(6):
        everything(comparator, associations)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        before = after if before is None else before
    assert before is not None
    return after - before


def test_threads(comparator: RowComparator, associations: AssociationRows) -> None:
    """Threads that call everything at once on the same objects get the answers of one thread."""
    expected = everything(comparator, associations)
    wrong: list[Any] = []
    barrier = threading.Barrier(8)

    def hammer() -> None:
        try:
            barrier.wait()
            for _ in range(3):
                assert everything(comparator, associations) == expected
        except BaseException as error:
            wrong.append(error)

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=hammer) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switching)
    assert wrong == []


LOADS = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location

for name, path in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    spec = spec_from_file_location(name, path, loader=ExtensionFileLoader(name, path))
    spec.loader.exec_module(module_from_spec(spec))
print(getattr(sys, "_is_gil_enabled", lambda: True)())
"""


def test_the_gil_stays_off(comparator: ModuleType, associations: ModuleType) -> None:
    """On a free-threaded Python the compiled modules do not switch the GIL on."""
    modules = [each for each in (comparator, associations) if each.__name__.endswith("_c")]
    if not modules:
        pytest.skip("interpreted modules load nothing")
    arguments = [part for each in modules for part in (each.__name__, str(each.__file__))]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHON_GIL"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOADS, *arguments],
        env=variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(not sysconfig.get_config_var("Py_GIL_DISABLED"))
