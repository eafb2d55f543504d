"""Words for made-up facts: plain nouns, first names and professions, which most tokenizers write in one token each."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from sink_patch.evaluate.recall.scripts.script import following

WORDS = tuple(
    str.split("""
    apple arrow baby bag ball bank basket beach bear bed bee bell bird board boat bone book bottle bowl box branch brass
    bread brick bridge brush bus butter button cake camera camp candle car card castle cat chain chair cheese church
    circle clock cloud coal coat coffee coin corn cotton cow cream crown cup curtain deer desert desk diamond dog door
    dragon dress drum dust eagle ear earth egg engine farm feather fence field fire fish flag flower forest fox frog
    fruit garden gate ghost glass glove gold grain grass guitar gun hair hammer hand hat heart hill honey horse hotel
    house ice iron island jacket jewel juice key king kitchen knife ladder lake lamp leaf leather lemon letter library
    light lion lock magic map market meat metal milk mirror money monkey moon mountain mouse music needle nest oil onion
    orange oven paint paper park pen pepper phone piano pig pipe plane plate pocket potato queen rabbit radio rain ring
    river road robot rock roof root rope salt sand school sea seed sheep shell ship shirt shoe silk silver sky smoke
    snake snow soap soldier song soup spider spoon star steel stone sugar sun sword table tail tea temple tent tiger
    tower town train tree truck tunnel wall watch water wheel wind window wine wire wolf wood wool yard
    """)
)

NAMES = tuple(
    str.split("""
    Alice Anna Ben Bob Carol Clara Daniel David Ella Emma Frank Fred George Grace Helen Henry Ian Isaac Jack Jane Kate
    Kevin Laura Leo Mark Mary Nina Nora Oliver Oscar Paul Peter Quinn Rachel Rose Sam Sarah Steve Tina Tom Victor
    """)
)

JOBS = tuple(
    str.split("""
    actor artist baker banker butcher captain carpenter clerk coach cook dancer doctor driver farmer fisher gardener
    guard hunter judge king lawyer miner nurse painter pilot poet priest sailor singer soldier teacher
    """)
)

CITIES = tuple(
    str.split("""
    Athens Berlin Boston Cairo Chicago Dallas Delhi Denver Dublin Geneva Houston Kyoto Lima Lisbon London Madrid Miami
    Milan Moscow Oslo Paris Prague Rome Seattle Sydney Tokyo Toronto Venice Vienna
    """)
)


def without_end(rng: random.Random, words: Sequence[str]) -> Iterator[str]:
    """Words in a random order, none of which comes again within three quarters of their number."""
    free, newest = list(words), deque[str]()
    while True:
        newest.append(free.pop(rng.randrange(len(free))))
        yield newest[-1]
        if len(newest) > len(words) * 3 // 4:
            free.append(newest.popleft())


def short(tokenizer: Any, before: str, words: Sequence[str]) -> Sequence[str]:
    """Those that are one token each behind a text, which are all as hard to write; all, if these are too few."""
    found = [word for word in words if len(following(tokenizer, before, f" {word}")) == 1]
    return found if len(found) > len(words) // 2 else words
