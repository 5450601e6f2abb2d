"""Exactly one `TransactionEnded` for each transaction, whatever a unit of work does."""

from __future__ import annotations

import asyncio
from typing import Any, Literal, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from pgtoolset import (
    TransactionAbortedError,
    TransactionStateError,
    create_db_context,
    get_transaction,
    release_connection,
    run_transaction,
)
from pgtoolset.observe import subscribe
from tests.observe.conftest import Events
from tests.support import examples, swallow_error

Step: TypeAlias = Literal[
    "statement", "commit", "rollback", "savepoint", "failed savepoint", "bad", "release", "raise"
]
Form: TypeAlias = Literal["unit", "block", "run"]
Ends: TypeAlias = list[tuple[str, str | None]]

STEPS: tuple[Step, ...] = Step.__args__  # type: ignore[attr-defined]
FORMS: tuple[Form, ...] = Form.__args__  # type: ignore[attr-defined]

DIVISION = "22012"


class Failure(Exception):
    """Raised by a program, and by nothing else."""


def ends_of(steps: list[Step]) -> Ends:
    """What PostgreSQL's documentation says of the steps of a unit, and of its end.

    A unit begins its first transaction itself. After an end in its middle, a nested block is an
    outermost one, unless another statement has begun the next transaction.
    """
    ends: Ends = []
    has_begun, is_open, is_aborted = True, False, False
    for step in [*steps, "commit"]:
        if step == "raise" or (is_aborted and step not in ("commit", "rollback")):
            return [*ends, ("rolled_back", DIVISION if is_aborted else None)] if is_open else ends
        if step == "commit" and is_aborted:
            return [*ends, ("aborted", DIVISION)]
        if step in ("commit", "rollback", "release"):
            if is_open:
                outcome = "rolled_back" if step == "rollback" else "committed"
                ends.append((outcome, DIVISION if is_aborted else None))
            has_begun = has_begun and step == "release"
            is_open = is_aborted = False
        elif not has_begun and "savepoint" in step:
            ends.append(("committed", None) if step == "savepoint" else ("rolled_back", DIVISION))
        else:
            has_begun, is_open, is_aborted = True, True, step == "bad"
    return ends


async def run_steps(session: Any, steps: list[Step]) -> None:
    for step in steps:
        match step:
            case "statement":
                await session.execute(text("SELECT 1"))
            case "commit":
                await session.commit()
            case "rollback":
                await session.rollback()
            case "savepoint":
                async with get_transaction(session):
                    await session.execute(text("SELECT 1"))
            case "failed savepoint":
                with pytest.raises(DBAPIError, match="division by zero"):
                    async with get_transaction(session):
                        await session.execute(text("SELECT 1 / 0"))
            case "bad":
                error = await swallow_error(session)
                if "division by zero" not in str(error):
                    raise error
            case "release":
                async with release_connection(session):
                    pass
            case "raise":
                raise Failure


async def run_program(engine: AsyncEngine, form: Form, steps: list[Step]) -> None:
    maker = async_sessionmaker(engine)
    try:
        if form == "unit":
            async with create_db_context(maker)() as session:
                await run_steps(session, steps)
        elif form == "block":
            async with maker() as session, get_transaction(session):
                await run_steps(session, steps)
        else:
            await run_transaction(maker, lambda session: run_steps(session, steps))
    except (Failure, DBAPIError, TransactionAbortedError, TransactionStateError, AssertionError):
        pass


@settings(
    max_examples=examples(80),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(form=st.sampled_from(FORMS), steps=st.lists(st.sampled_from(STEPS), max_size=8))
def test_exactly_one(
    runner: asyncio.Runner, shared_engine: AsyncEngine, form: Form, steps: list[Step]
) -> None:
    """A unit, a block and an attempt report each of their transactions once, in order, with its
    outcome and its SQLSTATE."""
    events = Events()
    unsubscribe = subscribe(shared_engine, events.append)
    try:
        runner.run(run_program(shared_engine, form, steps))
    finally:
        unsubscribe()
    assert events.ends() == ends_of(steps)
    assert shared_engine.pool.checkedout() == 0  # type: ignore[attr-defined]
