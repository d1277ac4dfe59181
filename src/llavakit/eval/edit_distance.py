"""How many characters must be put in, left out or changed to make one text of another (Levenshtein)."""

from __future__ import annotations


def distance(first: str, second: str) -> int:
    """In one step a character of ``second``: the column of the classic table is held as two whole numbers, one bit a row (Myers 1999).

    ``up`` and ``down`` say at which rows the column rises or falls by one; the last row's value is followed along.
    """
    if not first:
        return len(second)
    rows, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    places: dict[str, int] = {}
    for row, character in enumerate(first):
        places[character] = places.get(character, 0) | 1 << row
    up, down, value = rows, 0, len(first)
    for character in second:
        same = places.get(character, 0)
        vertical = same | down
        level = (((same & up) + up) ^ up) | same
        rise, fall = down | ~(level | up) & rows, up & level
        value += bool(rise & last) - bool(fall & last)
        rise, fall = (rise << 1) | 1, fall << 1
        up, down = (fall | ~(vertical | rise)) & rows, rise & vertical & rows
    return value
