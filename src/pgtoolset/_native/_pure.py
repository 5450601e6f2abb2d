"""Stand-ins for the parts of `cython` that the hot modules use.

The interpreted modules use them, also where Cython is installed: to import it takes longer than
half of this package. So do type checkers.

See https://cython.readthedocs.io/en/latest/src/tutorial/pure.html
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

__all__ = ["Py_ssize_t", "bint", "cfunc", "compiled", "p_const_char"]

F = TypeVar("F", bound=Callable[..., object])

#: Whether the module has been compiled. Cython replaces it by `True` when it compiles.
compiled: bool = False

Py_ssize_t: TypeAlias = int
bint: TypeAlias = bool
p_const_char: TypeAlias = Any


def cfunc(function: F) -> F:
    """Mark a function that only its module calls, so that it can become a C function."""
    return function


if TYPE_CHECKING:
    # Used only in code that runs compiled.
    NULL: Any
    longlong: TypeAlias = int
    p_longlong: TypeAlias = Any
    ulonglong: TypeAlias = int

    def PyObject_GenericGetDict(instance: Any, context: Any) -> Any: ...
    def calloc(count: int, size: int) -> Any: ...
    def cast(type_: Any, value: Any) -> Any: ...
    def free(memory: Any) -> None: ...
    def memchr(data: Any, character: int, size: int) -> Any: ...
    def memcmp(one: Any, other: Any, size: int) -> int: ...
    def sizeof(type_: Any) -> int: ...
