from collections.abc import Collection, Sequence
from typing import Any

__all__ = ["are_integers", "key_columns", "pair_columns"]

def are_integers(values: Collection[Any], lowest: int, highest: int) -> bool: ...
def key_columns(
    class_: type[Any],
    instances: Sequence[Any],
    keys: Sequence[Any],
    width: int,
    positions: Sequence[int],
) -> list[list[Any]] | int: ...
def pair_columns(
    classes: tuple[type[Any], type[Any]],
    links: Sequence[Any],
    widths: tuple[int, int],
    positions: tuple[Sequence[int], Sequence[int]],
) -> list[list[Any]] | int: ...
