from collections.abc import Sequence
from typing import Any

__all__ = ["key_columns", "pair_columns"]

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
