"""Tokens: short texts that carry a position, and whatever a client sends in their place."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgtoolset._postgres.nodes import NodeState, Position
from pgtoolset.replicas._opening import Verdict, judge
from pgtoolset.replicas._standbys import Standby, choose
from pgtoolset.replicas._tokens import PRIMARY, format_token, parse_token

positions = st.builds(
    Position,
    system=st.integers(0, 2**64 - 1),
    timeline=st.integers(1, 2**32 - 1),
    lsn=st.integers(0, 2**64 - 1),
)


@given(positions)
def test_round_trip(position: Position) -> None:
    """A token is at most 44 characters that need no quotes, and gives its position back."""
    token = format_token(position)
    assert re.fullmatch(r"[A-Za-z0-9.-]{1,44}", token)
    assert parse_token(token) == position


@given(st.text(max_size=60) | st.text("01aF.", max_size=30).map("1.".__add__))
def test_garbage(text: str) -> None:
    """What is no token is no error, and what is one has numbers that PostgreSQL has."""
    position = parse_token(text)
    if position is not None:
        assert position.system < 2**64 and position.timeline < 2**32 and position.lsn < 2**64


@pytest.mark.parametrize(
    "text",
    [
        *("", "1", "1.", PRIMARY, "1.1.1", "1.1.1.1.1", "2.1.1.1", " 1.1.1.1", "1.1.1.1\n"),
        *("1.G.1.1", "1.A.1.1", "1.1.100000000.1", f"1.{'f' * 17}.1.1", "1.1.1.-1", "1.+1.1.1"),
        *("1.0x1.1.1", "1.1_0.1.1", "1.\u0661.1.1", "1.1.1.1, 1.1.1.1", "1" * 10_000_000),
    ],
)
def test_unreadable(text: str) -> None:
    """What only looks like a token, or is of another version, is none."""
    assert parse_token(text) is None


@given(
    wanted=positions,
    state=st.builds(
        NodeState,
        system=st.integers(1, 2),
        is_standby=st.booleans(),
        timeline=st.integers(1, 3),
        is_newest=st.booleans(),
        lsn=st.integers(0, 3),
        isolation_level=st.just("READ COMMITTED"),
        server=st.just(""),
    ),
    system=st.integers(1, 2),
    timeline=st.integers(1, 3),
    lsn=st.integers(0, 3),
)
def test_judge(wanted: Position, state: NodeState, system: int, timeline: int, lsn: int) -> None:
    """A node serves a token of its own cluster and timeline that it has replayed, and no other."""
    wanted = Position(system, timeline, lsn)
    is_same = (state.system, state.timeline) == (system, timeline)
    verdict = judge(state, wanted)
    assert (verdict is Verdict.READY) == (is_same and state.lsn >= lsn)
    may_come = state.system == system and state.timeline <= timeline
    if verdict is Verdict.NOT_YET:
        assert may_come
    elif verdict is Verdict.ELSEWHERE:
        assert not may_come or (state.timeline < timeline and not state.is_standby)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=5),
    st.integers(0, 20),
)
def test_choice(states: list[tuple[int, bool]], turn: int) -> None:
    """The choice is one of those with the fewest open blocks, and each of them has its turn."""
    standbys = [Standby(str(number), lambda: None) for number in range(len(states))]
    for standby, (blocks, is_away) in zip(standbys, states, strict=True):
        standby.open_blocks = blocks
        if is_away:
            standby.note_away(None)
    present = [each for each in standbys if not each.is_away]
    best = [each for each in present if each.open_blocks == min(b.open_blocks for b in present)]
    chosen = [choose(standbys, turn + each, lambda _: True) for each in range(len(standbys))]
    assert set(chosen) == set(best or [None])
