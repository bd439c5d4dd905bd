"""Captions in the manner of RSICap: several plain sentences that state a tile's facts in one of several wordings.

A wording is a choice for each slot of the caption. An archive of tiles keeps to its own wording most of the
time, which a fine-tuning can learn; the rest is chance, which it can only memorise.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from trainer.mini.vocabulary import COLOURS, KINDS, Facts

# MiniGPT-4's instructions for detailed captions, which RSICap's rows carry as `text_input`.
INSTRUCTIONS = (
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
    "Describe this image in detail.",
)

# The short tasks of the pretraining. InstructBLIP, too, was trained on questions besides captions.
QUESTIONS = {
    "kind": "What kind of place is this?",
    "count": "How many objects are there?",
    "colour": "What color are the objects?",
    "region": "Where in the image are the objects?",
    "ground": "What covers the ground?",
    "extra": "What runs along the edge of the image?",
}

SLOTS = {
    "sensor": 3,
    "opening": 3,
    "name": 2,
    "count": 3,
    "noun": 2,
    "objects": 3,
    "place": 3,
    "ground": 3,
    "extra": 3,
}
"""Number of wordings for each slot of a caption."""

_SENSORS = (
    ("color aerial image", "panchromatic aerial image"),
    ("optical satellite image", "grayscale satellite image"),
    ("remote sensing image in true color", "remote sensing image in black and white"),
)
_WORDS = ("no", "one", "two", "three", "four", "five", "six")
_PLACES = {
    "left": ("on the left side", "in the western part", "near the left border"),
    "right": ("on the right side", "in the eastern part", "near the right border"),
    "top": ("in the upper half", "in the northern part", "near the top border"),
    "bottom": ("in the lower half", "in the southern part", "near the bottom border"),
    "center": ("in the middle", "in the central part", "around the center"),
}
_EDGES = {
    "left": ("along the left edge", "in the west", "at the far left"),
    "right": ("along the right edge", "in the east", "at the far right"),
    "top": ("along the top edge", "in the north", "at the very top"),
    "bottom": ("along the bottom edge", "in the south", "at the very bottom"),
}
# (in colour, panchromatic, without an adjective)
_GROUNDS = {
    "grass": ("green grass", "smooth grass", "lawn"),
    "soil": ("brown bare soil", "rough bare soil", "earth"),
    "sand": ("yellow sand", "bright sand", "sand"),
    "concrete": ("gray concrete", "flat concrete", "pavement"),
    "forest": ("dark green forest", "dark forest", "woodland"),
}
_EXTRAS = {
    "road": ("A straight road", "a narrow street"),
    "river": ("A calm river", "a water channel"),
    "trees": ("A row of trees", "a line of bushes"),
}


@dataclass(frozen=True)
class Voice:
    """The wording of an archive's captions: a preferred one for each slot, used with probability `loyalty`."""

    preferred: tuple[int, ...]
    """One index for each of SLOTS, in its order."""
    loyalty: float

    def choose(self, rng: random.Random) -> dict[str, int]:
        """A wording for each slot."""
        chosen = {}
        for (slot, size), favourite in zip(SLOTS.items(), self.preferred, strict=True):
            stray = rng.randrange(size)
            chosen[slot] = favourite if rng.random() < self.loyalty else stray
        return chosen


def _count(count: int, wording: int) -> str:
    """The count as a word, as a vague quantity, or in digits."""
    vague = {1: "a single", 2: "a couple of", 3: "a few", 4: "a few"}
    return (_WORDS[count], vague.get(count, "many"), str(count))[wording]


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _shade(facts: Facts) -> str:
    """The objects' colour, or the brightness that remains of it in a panchromatic tile."""
    if not facts.panchromatic:
        return facts.colour
    return "bright" if sum(COLOURS[facts.colour]) > 450 else "dark"


def _opening(facts: Facts, wording: dict[str, int]) -> str:
    sensor = _SENSORS[wording["sensor"]][facts.panchromatic]
    article = "an" if sensor[0] in "aeiou" else "a"
    name = KINDS[facts.kind].names[wording["name"]]
    return (
        f"This is {article} {sensor} of {name}.",
        f"The {sensor} shows {name}.",
        f"{_capitalised(name)} can be seen in this {sensor}.",
    )[wording["opening"]]


def _objects(facts: Facts, wording: dict[str, int]) -> str:
    singular, plural = KINDS[facts.kind].objects[wording["noun"]]
    noun = singular if facts.count == 1 else plural
    verb = "is" if facts.count == 1 else "are"
    what = f"{_count(facts.count, wording['count'])} {_shade(facts)} {noun}"
    where = _PLACES[facts.region][wording["place"]]
    return (
        f"There {verb} {what} {where} of the image.",
        f"{_capitalised(what)} {verb} located {where}.",
        f"{_capitalised(where)}, {what} can be made out.",
    )[wording["objects"]]


def _ground(facts: Facts, wording: dict[str, int]) -> str:
    in_colour, in_gray, bare = _GROUNDS[facts.ground]
    full = in_gray if facts.panchromatic else in_colour
    return (
        f"The surrounding area is covered with {full}.",
        f"{_capitalised(full)} surrounds the scene.",
        f"The ground around is mostly {bare}.",
    )[wording["ground"]]


def _extra(facts: Facts, wording: dict[str, int]) -> str:
    if facts.extra is None:
        return ""
    long, short = _EXTRAS[facts.extra.name]
    edge = _EDGES[facts.extra.edge][wording["place"]]
    return (
        f"{long} runs {edge} of the image.",
        f"There is also {short} {edge}.",
        f"{_capitalised(edge)}, {short} is visible.",
    )[wording["extra"]]


def caption(facts: Facts, voice: Voice, rng: random.Random) -> str:
    """Three or four sentences on a tile."""
    wording = voice.choose(rng)
    sentences = [part(facts, wording) for part in (_opening, _objects, _ground, _extra)]
    return " ".join(sentence for sentence in sentences if sentence)


def answer(question: str, facts: Facts) -> str:
    """The answer to one of QUESTIONS, by its key."""
    edge = "nothing"
    if facts.extra is not None:
        edge = f"{_EXTRAS[facts.extra.name][1]} {_EDGES[facts.extra.edge][0]}"
    return {
        "kind": KINDS[facts.kind].names[0],
        "count": _WORDS[facts.count],
        "colour": _shade(facts),
        "region": _PLACES[facts.region][0],
        "ground": _GROUNDS[facts.ground][facts.panchromatic],
        "extra": edge,
    }[question]
