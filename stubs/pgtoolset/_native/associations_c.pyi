from collections.abc import Sequence
from typing import Any

__all__ = ["key_columns", "pair_columns"]

def key_columns(
    instances: Sequence[Any], keys: Sequence[tuple[Any, ...]], positions: Sequence[int]
) -> list[list[Any]]: ...
def pair_columns(
    owners: Sequence[tuple[Any, ...]],
    related: Sequence[tuple[Any, ...]],
    owner_positions: Sequence[int],
    related_positions: Sequence[int],
) -> list[list[Any]]: ...
