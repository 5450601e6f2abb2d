"""What the hot modules use of `cython` at run time, for where Cython is not installed, and for type checkers.

See https://cython.readthedocs.io/en/latest/src/tutorial/pure.html
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar

__all__ = ["Py_ssize_t", "bint", "cfunc", "compiled"]

F = TypeVar("F", bound=Callable[..., object])

#: Whether the module has been compiled. Read by Cython when it does so.
compiled = False

Py_ssize_t: TypeAlias = int
bint: TypeAlias = bool


def cfunc(function: F) -> F:
    """A function that only its module calls, so that it can be one of C."""
    return function
