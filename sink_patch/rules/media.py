"""Where images and sounds stand in the columns of a prompt and in its positions, in plain integers.

Where positions have several coordinates (M-RoPE), an image has as many positions as it has rows or columns of patches,
and what follows goes on behind those: text positions lag behind the tokens by what images save. Three tokens of text,
an image of 2 x 4 patches, and text:

    index     0 1 2 | 3 4 5 6 7 8 9 10 | 11 12
    height          | 3 3 3 3 4 4 4 4  |
    width           | 3 4 5 6 3 4 5 6  |
    position  0 1 2 | 3 3 3 3 3 3 3 3  |  7  8

The position of a token of an image is said to be that at which the image begins. `places` are ((3, 3, False),
(11, 7, True)): from index 3 on the position is 3, from 11 on it goes on from 7.
"""

from __future__ import annotations

from collections.abc import Sequence

Place = tuple[int, int, bool]  # (first index, its position, whether each token that follows has a position of its own)
Span = tuple[int, int]  # (first index, index behind the last one) of an image


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


def spans_of(of_image: Sequence[bool], seen: int) -> tuple[Span, ...]:
    """The images among tokens of a row, of which `seen` came before; those that touch each other are one."""
    borders = [False, *of_image, False]
    changes = [seen + place for place in range(len(borders) - 1) if borders[place] != borders[place + 1]]
    return tuple(zip(changes[::2], changes[1::2], strict=True))


def behind_image(spans: Sequence[Span], where: range, num_sink_tokens: int, longest: int) -> int | None:
    """Where a window begins that would begin within an image, whose first tokens have left: behind it.

    An image that begins among the sinks is none, nor one longer than the ring. With 2 sinks, a ring of 6 and an image
    of 4 tokens from 5 on, a window that would begin at 6, 7 or 8 begins at 9; one that begins at 5 holds the image.

    Args:
        where: the first index that fits into the window, and those at which it may begin.
        longest: tokens of the ring.

    Returns:
        None: it begins where it would.
    """
    for first, end in spans:
        if num_sink_tokens <= first < where.start < end <= first + longest and end in where:
            return end
    return None


def position_of(places: Sequence[Place], index: int) -> int:
    """The position of a token of a row, as the model counts it, from its index in the stream."""
    for first, position, counts in reversed(places):
        if first <= index:
            return position + (index - first if counts else 0)
    return index


def places_of(
    of_image: Sequence[bool], lowest: Sequence[int], end: int, before: Sequence[Place] = (), seen: int = 0
) -> tuple[Place, ...]:
    """The places of a row when it has read a prompt, or a later turn.

    Args:
        of_image: of each token, whether it belongs to an image.
        lowest: of each token, the smallest of its coordinates.
        end: position of the token that follows.
        before: the places before that.
        seen: tokens before that.
    """
    found = list(before)
    for number, (index, position) in enumerate(enumerate(lowest, start=seen)):
        if of_image[number]:
            if number == 0 or not of_image[number - 1]:
                found = [place for place in found if place[0] < index] + [(index, position, False)]
        elif position != position_of(found, index) or (found and not found[-1][2]):
            found.append((index, position, True))
    if position_of(found, seen + len(lowest)) != end or (found and not found[-1][2]):
        found.append((seen + len(lowest), end, True))
    return tuple(found)


def images_of_rows(tokens: Sequence[int], sizes: Sequence[int]) -> list[range] | None:
    """Which of the images of a batch, in the order of its rows, belong to each row; None: that cannot be said.

    Args:
        tokens: of each row, how many stand for images.
        sizes: of the images, in any unit.
    """
    found, first, all_tokens, all_sizes = list[range](), 0, sum(tokens), sum(sizes)
    for count in tokens:
        end, left = first, count * all_sizes
        while left > 0 and end < len(sizes):
            left -= sizes[end] * all_tokens
            end += 1
        if left:
            return None
        found.append(range(first, end))
        first = end
    return found if first == len(sizes) else None
