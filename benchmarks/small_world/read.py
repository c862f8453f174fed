"""What is in a picture of the small world: the scene and the looks that explain its pixels best.

Nothing is learned here: every layout that `draw` knows is tried with every colour and place, mirrored or not, and the
one with the least squared error is the answer. Regions of a layout do not overlap, so each picks its colour on its
own, and the 360 layouts are a few matrix products.

    python -m benchmarks.small_world.read       # its accuracy on true pictures, and on those with noise
"""

from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np

from benchmarks.small_world import draw

CLEAR = 0.1  # the largest error, root mean square of pixels in 0..1, of a picture that counts as drawn
LAYOUTS = list(product(draw.CLASSES, draw.PATTERNS, draw.SIZES, draw.FACINGS, draw.POSITIONS))


class Reading(NamedTuple):
    """What a picture shows, and how far its pixels are from that (root mean square, pixels in 0..1)."""

    looks: draw.Looks
    scene: draw.Scene
    error: float

    @property
    def is_clear(self) -> bool:
        return self.error < CLEAR


@cache
def regions() -> np.ndarray:
    """Which region each pixel belongs to: booleans as float32, (5, layouts, SIDE * SIDE)."""
    shares = np.stack([draw.layout(kind, *rest) for kind, *rest in LAYOUTS], axis=1)
    labels = shares.reshape(5, len(LAYOUTS), -1).argmax(axis=0)
    return np.stack([labels == region for region in range(5)]).astype(np.float32)


def colour_errors(pixels: np.ndarray, region: int, colours: np.ndarray) -> np.ndarray:
    """Squared error of a region of each layout painted in each colour: (layouts, colours), for pixels (N, 3)."""
    where = regions()[region]
    own, sums = where @ (pixels**2).sum(axis=1), where @ pixels
    return own[:, None] - 2 * sums @ colours.T + where.sum(axis=1)[:, None] * (colours**2).sum(axis=1)


def read(picture: np.ndarray) -> Reading:
    """Read a picture, (SIDE, SIDE, 3), uint8."""
    pixels = picture.reshape(-1, 3).astype(np.float32) / 255
    plain = [draw.backdrop(place) / 255 for place in draw.PLACES]
    behind = np.stack([one.reshape(-1, 3) for one in (*plain, *(one[:, ::-1] for one in plain))])  # mirrored too
    palette = np.float32(list(draw.COLOURS.values())) / 255
    place_errors = regions()[draw.BACKGROUND] @ ((pixels - behind) ** 2).sum(axis=2).T
    detail = colour_errors(pixels, draw.DETAIL, np.float32([draw.DARK]) / 255)[:, 0]
    body, pattern, accent = (
        colour_errors(pixels, region, palette) for region in (draw.BODY, draw.PATTERN, draw.ACCENT)
    )
    same = np.eye(len(palette), dtype=np.float32) * 1e9  # neither a pattern nor an accent has the body's colour
    patterned = np.array([layout[1] != "plain" for layout in LAYOUTS])
    second = pattern[:, None, :] + same * patterned[:, None, None]
    third = accent[:, None, :] + same
    painted = body + second.min(axis=2) + third.min(axis=2)
    errors = detail + place_errors.min(axis=1) + painted.min(axis=1)
    best = int(errors.argmin())
    main = int(painted[best].argmin())
    names, (kind, pattern_name, *where) = list(draw.COLOURS), LAYOUTS[best]
    looks = draw.Looks(
        kind, names[main], pattern_name, names[second[best, main].argmin()], names[third[best, main].argmin()]
    )
    scene = draw.Scene(list(draw.PLACES)[place_errors[best].argmin() % len(plain)], *where)
    return Reading(looks, scene, float(max(errors[best], 0) / pixels.size) ** 0.5)


def looks_right(reading: Reading, looks: draw.Looks) -> float:
    """The share, 0 to 1, of the colour, the pattern, its colour and the accent that are right; 0 for another class.

    A plain thing's second colour is right, a pattern's that is missing is not. A blurred picture has nothing right.
    """
    found, plain = reading.looks, looks.pattern == "plain"
    if not reading.is_clear or found.kind != looks.kind:
        return 0.0
    second = (found.pattern == "plain") == plain and (plain or found.second == looks.second)
    right = [found.colour == looks.colour, found.pattern == looks.pattern, second, found.accent == looks.accent]
    return sum(right) / len(right)


def accuracy(noise: float, count: int = 200) -> tuple[float, float]:
    """How often the scene, and how often the looks, of a true picture are read right, with noise of 0 to 255."""
    generator, scenes, looks = np.random.default_rng(1), 0, 0.0
    for _ in range(count):
        thing, scene = draw.any_looks(generator), draw.any_scene(generator)
        picture = draw.draw(thing, scene, generator) + generator.normal(0, noise, (draw.SIDE, draw.SIDE, 3))
        reading = read(picture.clip(0, 255).astype(np.uint8))
        scenes += reading.scene == scene
        looks += looks_right(reading, thing)
    return scenes / count, looks / count


if __name__ == "__main__":
    for level in (0, 10, 20):
        print("noise {}: scene {:.3f}, looks {:.3f}".format(level, *accuracy(level)))
