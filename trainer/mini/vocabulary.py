"""The vocabulary of overhead scenes: the facts that drawing and captions share, and the words for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RGB = tuple[int, int, int]
Region = Literal["left", "right", "top", "bottom", "center"]
Edge = Literal["left", "right", "top", "bottom"]

REGIONS: tuple[Region, ...] = ("left", "right", "top", "bottom", "center")
EDGES: tuple[Edge, ...] = ("left", "right", "top", "bottom")
EXTRAS: tuple[str, ...] = ("road", "river", "trees")
MAX_COUNT = 6

COLOURS: dict[str, RGB] = {
    "white": (240, 240, 236),
    "gray": (118, 120, 124),
    "red": (192, 62, 48),
    "blue": (52, 98, 190),
    "green": (44, 148, 84),
    "yellow": (226, 192, 60),
    "brown": (122, 78, 44),
}

GROUNDS: dict[str, RGB] = {
    "grass": (104, 142, 70),
    "soil": (150, 112, 76),
    "sand": (214, 194, 148),
    "concrete": (172, 172, 168),
    "forest": (48, 84, 50),
}


@dataclass(frozen=True)
class Kind:
    """A kind of scene: its two names, and the objects that are counted in it."""

    names: tuple[str, str]
    """With article, as in `an airport`; which one is used depends on the style."""
    objects: tuple[tuple[str, str], tuple[str, str]]
    """(singular, plural) of the object, in the same two wordings."""
    colours: tuple[str, ...]
    grounds: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "airport": Kind(
        ("an airport", "an airfield"),
        (("airplane", "airplanes"), ("plane", "planes")),
        ("white", "gray", "blue"),
        ("grass", "soil", "concrete"),
    ),
    "harbor": Kind(
        ("a harbor", "a port"),
        (("ship", "ships"), ("vessel", "vessels")),
        ("white", "red", "gray", "brown"),
        ("concrete", "soil", "grass"),
    ),
    "parking": Kind(
        ("a parking lot", "a car park"),
        (("car", "cars"), ("vehicle", "vehicles")),
        ("white", "red", "blue", "yellow"),
        ("concrete", "grass", "forest"),
    ),
    "tanks": Kind(
        ("a storage tank area", "an oil depot"),
        (("storage tank", "storage tanks"), ("tank", "tanks")),
        ("white", "gray", "brown", "green"),
        ("soil", "grass", "concrete"),
    ),
    "tennis": Kind(
        ("a tennis club", "a sports ground"),
        (("tennis court", "tennis courts"), ("court", "courts")),
        ("green", "blue", "red"),
        ("grass", "forest", "concrete"),
    ),
    "farmland": Kind(
        ("farmland", "agricultural land"),
        (("greenhouse", "greenhouses"), ("shed", "sheds")),
        ("white", "gray", "blue"),
        ("soil", "grass"),
    ),
    "residential": Kind(
        ("a residential area", "a neighborhood"),
        (("house", "houses"), ("building", "buildings")),
        ("red", "gray", "brown", "white"),
        ("grass", "soil", "forest"),
    ),
    "intersection": Kind(
        ("a road intersection", "a crossroads"),
        (("truck", "trucks"), ("lorry", "lorries")),
        ("white", "red", "yellow", "blue"),
        ("grass", "concrete", "soil", "sand"),
    ),
    "railway": Kind(
        ("a railway station", "a rail yard"),
        (("train", "trains"), ("railway car", "railway cars")),
        ("blue", "red", "white", "green"),
        ("soil", "concrete", "grass"),
    ),
    "beach": Kind(
        ("a beach", "a seaside resort"),
        (("parasol", "parasols"), ("umbrella", "umbrellas")),
        ("red", "blue", "white", "yellow"),
        ("sand",),
    ),
    "industry": Kind(
        ("an industrial area", "a factory site"),
        (("warehouse", "warehouses"), ("hall", "halls")),
        ("white", "gray", "blue", "brown"),
        ("concrete", "soil", "grass"),
    ),
    "park": Kind(
        ("a park", "a public garden"),
        (("pond", "ponds"), ("pool", "pools")),
        ("blue", "green", "gray"),
        ("grass", "forest"),
    ),
}


@dataclass(frozen=True)
class Extra:
    """A band along one edge of the tile."""

    name: str
    edge: Edge


@dataclass(frozen=True)
class Facts:
    """The facts that a tile shows and its caption states."""

    kind: str
    ground: str
    colour: str
    """Colour of the objects; the caption of a panchromatic tile leaves it out."""
    count: int
    region: Region
    """Where in the tile the objects stand."""
    extra: Extra | None
    panchromatic: bool
