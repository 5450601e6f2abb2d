from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["changed_lines", "changed_rows", "same_value"]

def changed_lines(before: bytes, after: bytes) -> tuple[list[bytes], list[bytes]]: ...
def changed_rows(
    rows: Sequence[Sequence[Any]], known: Mapping[Any, Sequence[Any]], width: int
) -> list[int]: ...
def same_value(left: Any, right: Any) -> bool: ...
