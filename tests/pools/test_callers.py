"""The line that took a connection: noted as a function and an instruction, found when shown."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import GeneratorType
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from pgtoolset import holders
from pgtoolset._postgres.callers import line_of


def lines() -> Iterator[object]:
    """Stops in lines of many kinds."""
    yield 1
    for number in range(2):
        yield (
            number,
            (yield number),
            [
                number,
                (yield),
            ],
        )
    try:
        yield {"a": (yield), "b": [each + 1 for each in range(3)]}
    finally:
        with memoryview(b"") as view:
            yield (
                view
                if (yield)
                # a comment between two lines of one expression
                else (yield)
            )
    yield lambda: (yield)


def test_the_line_of_an_instruction() -> None:
    """The line is that which Python gives for the frame, at each instruction where it may stop."""
    generator: Any = lines()
    assert isinstance(generator, GeneratorType)
    seen = []
    for _ in generator:
        frame = generator.gi_frame
        assert frame is not None
        assert line_of((frame.f_code, frame.f_lasti)) == frame.f_lineno
        seen.append(frame.f_lineno)
    assert len(set(seen)) >= 9


def test_a_place_before_any_line() -> None:
    """An instruction without a line is shown as the first line of its function."""
    code = lines.__code__
    assert line_of((code, 10**6)) == code.co_firstlineno


class Held:
    """Something that a function has, and that can be referred to weakly."""


async def test_nothing_of_the_call_is_kept(engine: AsyncEngine) -> None:
    """While a connection is out, what the function that took it had can be collected."""
    assert holders(engine) == []

    async def take() -> tuple[AsyncConnection, weakref.ref[Held]]:
        held = Held()
        connection = await engine.connect()
        await connection.execute(text("SELECT 1"))
        return connection, weakref.ref(held)

    connection, held = await take()
    gc.collect()
    assert held() is None
    [holder] = holders(engine)
    assert holder.where is not None
    assert holder.where.function == "take"
    await connection.close()
