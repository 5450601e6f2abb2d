"""The line of the application that runs a statement, found in the frames above SQLAlchemy.

SQLAlchemy runs its synchronous half in a greenlet of its own, whose frames end where it began. They
go on in the greenlet around it. https://greenlet.readthedocs.io/en/latest/api.html
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from types import CodeType, FrameType
from typing import TypeAlias

import greenlet
import sqlalchemy

#: A function and the instruction in it; `line_of` gives its line. Both are small, and keep nothing
#: of a call alive, as a frame does.
Caller: TypeAlias = tuple[CodeType, int]

#: What a file is: part of the machinery between the application and the pool, the event loop below
#: a task, another package or Python's own library, or the application.
_MACHINERY, _LOOP, _LIBRARY, _APPLICATION, _UNNAMED = range(5)

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


def _folder(file: str | None) -> str:
    return os.path.dirname(file or "") + os.sep


_MACHINERY_FILES = (
    contextlib.__file__,
    _folder(asyncio.__file__),
    _folder(greenlet.__file__),
    _folder(sqlalchemy.__file__),
    os.path.join(_ROOT, "pgtoolset", ""),
    os.path.join(_ROOT, "pytest_pgtoolset", ""),
)
_MACHINERY_PACKAGES = ("sqlalchemy", "pgtoolset", "pytest_pgtoolset", "contextlib", "asyncio")
_LOOP_FILES = tuple(
    _folder(asyncio.__file__) + name for name in ("base_events.py", "events.py", "runners.py")
)
_LIBRARY_FILES = (_folder(os.__file__),)
_LIBRARY_FOLDERS = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))

#: The kind of each file that was seen; emptied where a program makes files without end.
_kinds: dict[str, int] = {}
_MOST_KINDS = 4096


def caller() -> Caller | None:
    """Return the innermost place of the application that led here.

    Where there is none in the task, that of another package: an application may be installed as
    one. `None` where there is neither.
    """
    current = greenlet.getcurrent()
    parent = current.parent
    spawning = None if parent is None else parent.gr_frame
    method = None if spawning is None else spawning.f_back
    if parent is not None and method is not None:
        # Above a method such as `AsyncSession.execute` the greenlet runs SQLAlchemy's functions
        # alone, more than a dozen: to look at each would cost as much as all the rest.
        code = method.f_code
        if _kinds.get(code.co_filename) == _MACHINERY and code.co_name != "run_sync":
            above = method.f_back
            if above is not None and _kinds.get(above.f_code.co_filename) == _APPLICATION:
                return above.f_code, above.f_lasti
            found = _innermost(above, parent)
            if found is not None:
                return found
    return _innermost(sys._getframe(1), current)


def line_of(found: Caller) -> int:
    """Return the number of the line, which is only worth looking for where it is shown."""
    code, instruction = found
    for start, end, line in code.co_lines():
        if start <= instruction < end and line is not None:
            return line
    return code.co_firstlineno


def _innermost(frame: FrameType | None, current: greenlet.greenlet) -> Caller | None:
    """Return the innermost place of the application from a frame on, in a greenlet and those around
    it.
    """
    other: Caller | None = None
    around: greenlet.greenlet | None = current
    while around is not None:
        while frame is not None:
            code = frame.f_code
            kind = _kinds.get(code.co_filename)
            if kind != _MACHINERY:  # most are
                if kind is None or kind == _UNNAMED:
                    kind = _kind_of(frame)
                if kind == _APPLICATION:
                    return code, frame.f_lasti
                if kind == _LOOP:
                    return other
                if kind == _LIBRARY and other is None:
                    other = code, frame.f_lasti
            frame = frame.f_back
        around = around.parent
        frame = None if around is None else around.gr_frame
    return other


def _kind_of(frame: FrameType) -> int:
    file = frame.f_code.co_filename
    kind = _kinds.get(file)
    if kind is None:
        if len(_kinds) >= _MOST_KINDS:
            _kinds.clear()
        kind = _kinds[file] = _kind_of_file(file)
    return _kind_of_module(frame.f_globals.get("__name__")) if kind == _UNNAMED else kind


def _kind_of_module(name: object) -> int:
    """Return what a function is that was made out of a text, as SQLAlchemy makes some of its own.

    That of a prompt, or of `python -c`, is of `__main__`.
    """
    is_application = isinstance(name, str) and name.partition(".")[0] not in _MACHINERY_PACKAGES
    return _APPLICATION if is_application else _MACHINERY


def _kind_of_file(file: str) -> int:
    if file.startswith("<"):
        return _MACHINERY if file.startswith("<frozen ") else _UNNAMED
    if file.startswith(_LOOP_FILES):
        return _LOOP
    if file.startswith(_MACHINERY_FILES):
        return _MACHINERY
    is_library = file.startswith(_LIBRARY_FILES) or any(each in file for each in _LIBRARY_FOLDERS)
    return _LIBRARY if is_library else _APPLICATION
