"""Where images and sounds stand in the columns of a prompt, in plain integers."""

from __future__ import annotations

from collections.abc import Sequence


def pieces(joined: Sequence[bool], size: int) -> list[tuple[int, int]]:
    """The columns of a prompt in pieces of at most `size` columns that cut no image: (first, end) of each.

    An image that is longer than that is a piece by itself. With a size of 4 and an image in columns 2 to 6:

        columns   0 1 | 2 3 4 5 6 | 7 8 9
        joined    - - | - x x x x | - - -

    Args:
        joined: of each column, whether it goes on with an image (of any row) that has begun in a column before.
    """
    columns, found, first = len(joined), list[tuple[int, int]](), 0
    while first < columns:
        end = min(first + size, columns)
        while first < end < columns and joined[end]:
            end -= 1
        if end == first:  # an image from here on
            end = first + 1
            while end < columns and joined[end]:
                end += 1
        found.append((first, end))
        first = end
    return found
