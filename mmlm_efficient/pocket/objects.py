"""The objects that pocket knows: names, plurals and the emoji each one is drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

ASSETS = Path(__file__).parent / "assets"

# name, plural, code point in Microsoft's Fluent 3D emoji set (MIT licence, see assets/LICENSE)
_TABLE = """
dog dogs 1f436|cat cats 1f431|mouse mice 1f42d|rabbit rabbits 1f430|fox foxes 1f98a
bear bears 1f43b|panda pandas 1f43c|tiger tigers 1f42f|lion lions 1f981|cow cows 1f42e
pig pigs 1f437|frog frogs 1f438|chicken chickens 1f414|penguin penguins 1f427|owl owls 1f989
duck ducks 1f986|unicorn unicorns 1f984|bee bees 1f41d|butterfly butterflies 1f98b
snail snails 1f40c|ladybug ladybugs 1f41e|turtle turtles 1f422|octopus octopuses 1f419
crab crabs 1f980|whale whales 1f433|elephant elephants 1f418|koala koalas 1f428
snake snakes 1f40d|apple apples 1f34e|banana bananas 1f34c|grape grapes 1f347
strawberry strawberries 1f353|watermelon watermelons 1f349|carrot carrots 1f955
broccoli broccolis 1f966|mushroom mushrooms 1f344|bread breads 1f35e|pizza pizzas 1f355
burger burgers 1f354|donut donuts 1f369|cake cakes 1f382|cheese cheeses 1f9c0|car cars 1f697
bus buses 1f68c|train trains 1f682|airplane airplanes 2708|rocket rockets 1f680
boat boats 26f5|bicycle bicycles 1f6b2|tree trees 1f333|cactus cactuses 1f335
sunflower sunflowers 1f33b|rose roses 1f339|star stars 2b50|rainbow rainbows 1f308
snowman snowmen 26c4|umbrella umbrellas 2602|basketball basketballs 1f3c0
guitar guitars 1f3b8|clock clocks 23f0|house houses 1f3e0|robot robots 1f916
globe globes 1f30d|crown crowns 1f451
"""


@dataclass(frozen=True)
class ObjectKind:
    """One nameable object.

    Attributes:
        name: singular, one lower-case English word.
        plural: plural, one word, different from the singular.
        code_point: hexadecimal code point of the emoji.
    """

    name: str
    plural: str
    code_point: str


OBJECTS: tuple[ObjectKind, ...] = tuple(
    ObjectKind(*entry.split()) for entry in _TABLE.replace("\n", "|").split("|") if entry.strip()
)
NAMES: tuple[str, ...] = tuple(kind.name for kind in OBJECTS)
PLURALS: dict[str, str] = {kind.name: kind.plural for kind in OBJECTS}


@cache
def sprite(name: str) -> npt.NDArray[np.uint8]:
    """Picture of an object, uint8 RGBA [96, 96, 4] with straight alpha.

    Raises:
        KeyError: the name is not one of `NAMES`.
    """
    if name not in PLURALS:
        raise KeyError(f"unknown object {name!r}; known objects: {', '.join(NAMES)}")
    with Image.open(ASSETS / f"{name}.webp") as picture:
        return np.asarray(picture.convert("RGBA"))
