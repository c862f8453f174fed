"""The pictures of the small world: flat toys in flat places, 64 pixels square, each a function of what is in it.

    python -m benchmarks.small_world.draw world.png              # a sheet: any pictures, then one subject a row
    python -m benchmarks.small_world.draw dog --subject 0        # a folder: five photographs of one dog

A picture is a `Looks` (what the thing is) in a `Scene` (where and how it stands). A caption can say the class, the
main colour, the place, the size and the direction. It has no words for the pattern, the pattern's colour and the
accent's colour: these are what makes a subject, and what DreamBooth has to teach.
"""

import argparse
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64  # pixels
FINE = 4  # shapes are drawn so many times larger and shrunk, which smooths their edges
BACKGROUND, BODY, PATTERN, ACCENT, DETAIL = REGIONS = range(5)
DARK = (45, 40, 40)  # of details: eyes, wheels, masts

COLOURS = {
    "red": (215, 35, 35), "orange": (245, 140, 20), "yellow": (250, 225, 40), "white": (252, 252, 252),
    "blue": (35, 70, 220), "purple": (135, 50, 185), "pink": (252, 130, 195), "black": (15, 15, 15),
}  # fmt: skip
PLACES = {  # name: how a caption says it
    "grass": "on grass", "sand": "on sand", "snow": "in snow", "street": "on a street",
    "night": "at night", "room": "in a room", "sea": "at sea", "sunset": "at sunset",
}  # fmt: skip
BACKDROPS = {  # name: colour of the sky, of the ground, and shapes (kind, box in pixels, colour)
    "grass": ((150, 205, 240), (100, 180, 80), [("ellipse", (44, 4, 60, 12), (235, 245, 250))]),
    "sand": ((110, 190, 235), (232, 205, 135), [("ellipse", (4, 4, 14, 14), (255, 250, 190))]),
    "snow": ((165, 175, 190), (212, 226, 240), [("polygon", (36, 40, 50, 22, 64, 40), (140, 150, 170))]),
    "street": ((185, 180, 175), (112, 112, 117), [("rectangle", (2, 14, 18, 39), (150, 120, 110))]),
    "night": ((45, 45, 110), (55, 85, 75), [("ellipse", (48, 4, 58, 14), (240, 240, 205))]),
    "room": ((226, 192, 160), (150, 105, 65), [("rectangle", (4, 6, 20, 22), (190, 225, 240))]),
    "sea": ((205, 232, 240), (60, 140, 190), [("rectangle", (0, 58, 64, 64), (110, 180, 215))]),
    "sunset": ((240, 180, 155), (105, 75, 90), [("ellipse", (24, 30, 40, 46), (250, 220, 130))]),
}
HORIZON = 40  # pixels from the top, where the ground begins
FEET = 57  # pixels from the top, where things stand

# Each class faces right in a box from -1 to 1, y downwards: (region, shape, coordinates), later ones on top.
SHAPES: dict[str, list[tuple[int, str, tuple[float, ...]]]] = {
    "dog": [
        (ACCENT, "polygon", (-1, -0.6, -0.75, -0.65, -0.5, 0.1, -0.75, 0.15)),
        (BODY, "ellipse", (-0.85, -0.2, 0.6, 0.6)), (BODY, "rectangle", (-0.75, 0.2, -0.45, 1)),
        (BODY, "rectangle", (0.15, 0.2, 0.45, 1)), (BODY, "ellipse", (0.1, -0.85, 0.85, 0)),
        (BODY, "ellipse", (0.5, -0.5, 1, -0.1)), (ACCENT, "ellipse", (0.0, -0.9, 0.35, -0.1)),
        (DETAIL, "ellipse", (0.48, -0.68, 0.68, -0.48)),
    ],
    "cat": [
        (ACCENT, "polygon", (-0.45, 0.95, -0.95, 0.6, -0.95, -0.2, -0.7, -0.2, -0.65, 0.45, -0.35, 0.6)),
        (BODY, "ellipse", (-0.55, -0.3, 0.5, 1.05)), (BODY, "rectangle", (0.1, 0.4, 0.5, 1)),
        (ACCENT, "polygon", (-0.25, -0.5, -0.25, -1, 0.1, -0.7)),
        (ACCENT, "polygon", (0.3, -0.7, 0.65, -1, 0.65, -0.5)),
        (BODY, "ellipse", (-0.3, -0.85, 0.7, 0)), (DETAIL, "ellipse", (0.32, -0.55, 0.52, -0.35)),
    ],
    "bird": [
        (DETAIL, "rectangle", (-0.15, 0.4, -0.02, 1)), (DETAIL, "rectangle", (0.15, 0.4, 0.28, 1)),
        (ACCENT, "polygon", (-1, -0.6, -0.45, -0.15, -0.45, 0.3, -1, 0.1)),
        (BODY, "ellipse", (-0.65, -0.4, 0.6, 0.65)), (ACCENT, "polygon", (0.7, -0.7, 1.05, -0.45, 0.7, -0.2)),
        (BODY, "ellipse", (0.15, -0.9, 0.8, -0.1)), (DETAIL, "ellipse", (0.42, -0.68, 0.62, -0.48)),
    ],
    "car": [
        (BODY, "polygon", (-0.95, 0.05, -0.7, -0.6, 0.1, -0.6, 0.45, 0.05)), (BODY, "rectangle", (-1, -0.05, 1, 0.7)),
        (ACCENT, "polygon", (-0.65, 0.0, -0.52, -0.42, 0.02, -0.42, 0.22, 0.0)),
        (ACCENT, "rectangle", (0.8, 0.1, 1, 0.4)),
        (DETAIL, "ellipse", (-0.75, 0.4, -0.2, 1)), (DETAIL, "ellipse", (0.3, 0.4, 0.85, 1)),
    ],
    "boat": [
        (DETAIL, "rectangle", (-0.15, -1, 0, 0.3)), (ACCENT, "polygon", (0.05, -0.95, 0.05, 0.1, 0.85, 0.1)),
        (BODY, "rectangle", (-0.75, -0.1, -0.3, 0.4)), (BODY, "polygon", (-0.95, 0.25, 1.05, 0.25, 0.6, 1, -0.7, 1)),
    ],
    "house": [
        (ACCENT, "rectangle", (-0.75, -0.95, -0.45, -0.3)), (BODY, "rectangle", (-0.85, -0.2, 0.85, 1)),
        (ACCENT, "polygon", (-1.05, -0.15, 0, -0.9, 1.05, -0.15)), (DETAIL, "rectangle", (0.25, 0.35, 0.65, 1)),
    ],
}  # fmt: skip
CLASSES = list(SHAPES)
PATTERNS = ["plain", "stripes", "belt", "half", "spots"]
SIZES = {"small": 13, "big": 20}  # name: half the width of the thing's box, in pixels
FACINGS = ["left", "right"]
POSITIONS = {"left": -1, "middle": 0, "right": 1}
RARE_WORDS = ["sks", "ohwx", "zwx", "bnha"]  # mean nothing: a caption may have one before any thing


class Looks(NamedTuple):
    """What a thing is: keys of SHAPES, COLOURS and PATTERNS. A caption has words for the first two only."""

    kind: str
    colour: str
    pattern: str
    second: str  # colour of the pattern; without a meaning where it is plain
    accent: str  # colour of ears and tail, of a roof, of windows, of a sail


class Scene(NamedTuple):
    """Where and how it stands: keys of PLACES, SIZES, FACINGS, POSITIONS. A caption has no words for the position."""

    place: str
    size: str
    facing: str
    position: str


def in_pattern(pattern: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the pattern's colour is on a thing: booleans for coordinates in the thing's box, facing right."""
    if pattern == "stripes":
        return np.floor((x + 1) * 2.5) % 2 == 1
    if pattern == "belt":
        return (y > 0.0) & (y < 0.45)
    if pattern == "half":
        return x < -0.05
    if pattern == "spots":
        centres = [(-0.55, 0.1), (0.05, 0.5), (0.5, -0.25), (0.6, 0.55), (-0.55, 0.75)]
        return np.any([(x - a) ** 2 + (y - b) ** 2 < 0.25**2 for a, b in centres], axis=0)
    return np.zeros(np.broadcast(x, y).shape, bool)


@cache
def layout(kind: str, pattern: str, size: str, facing: str, position: str) -> np.ndarray:
    """How much of each pixel each region covers: (5, SIDE, SIDE), float32; the five add up to 1."""
    half = SIZES[size]
    centre_x, centre_y = SIDE / 2 + POSITIONS[position] * (SIDE / 2 - half - 1), FEET - half
    sign = 1 if facing == "right" else -1
    canvas = Image.new("L", (SIDE * FINE, SIDE * FINE), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for region, shape, numbers in SHAPES[kind]:
        xs = [(centre_x + sign * half * x) * FINE for x in numbers[::2]]
        ys = [(centre_y + half * y) * FINE for y in numbers[1::2]]
        if shape == "polygon":
            pen.polygon(list(zip(xs, ys, strict=True)), fill=region)
        else:
            getattr(pen, shape)((min(xs), min(ys), max(xs) - 1, max(ys) - 1), fill=region)
    labels = np.array(canvas)
    coordinates = (np.arange(SIDE * FINE) + 0.5) / FINE
    x, y = sign * (coordinates[None] - centre_x) / half, (coordinates[:, None] - centre_y) / half
    labels[(labels == BODY) & in_pattern(pattern, x, y)] = PATTERN
    shares = [(labels == region).reshape(SIDE, FINE, SIDE, FINE).mean(axis=(1, 3)) for region in REGIONS]
    return np.stack(shares).astype(np.float32)


@cache
def backdrop(place: str) -> np.ndarray:
    """A place without anything in it: (SIDE, SIDE, 3), float32, 0 to 255."""
    sky, ground, shapes = BACKDROPS[place]
    canvas = Image.new("RGB", (SIDE * FINE, SIDE * FINE), sky)
    pen = ImageDraw.Draw(canvas)
    for when in ("behind", "before"):
        if when == "before":
            pen.rectangle((0, HORIZON * FINE, SIDE * FINE, SIDE * FINE), fill=ground)
        for shape, box, colour in shapes:
            if (box[1] < HORIZON) == (when == "behind"):
                getattr(pen, shape)([number * FINE for number in box], fill=colour)
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)


def draw(looks: Looks, scene: Scene, generator: np.random.Generator | None = None) -> np.ndarray:
    """A picture, (SIDE, SIDE, 3), uint8. With a generator its colours are a little off, each by up to 8 of 255."""
    shares = layout(looks.kind, looks.pattern, scene.size, scene.facing, scene.position)
    colours = np.float32([COLOURS[looks.colour], COLOURS[looks.second], COLOURS[looks.accent], DARK])
    behind = backdrop(scene.place)
    if generator is not None:
        off = generator.uniform(-8, 8, (5, 3)).astype(np.float32)
        behind, colours = behind + off[0], colours + off[1:]
    pixels = shares[BACKGROUND][..., None] * behind + np.einsum("rhw,rc->hwc", shares[BODY:], colours)
    return pixels.clip(0, 255).round().astype(np.uint8)


def caption(looks: Looks, scene: Scene, said: Iterable[str] = (), rare_word: str = "") -> str:
    """What a caption says of a picture.

    Args:
        looks: of the thing.
        scene: of the picture.
        said: what is said besides the class: any of "size", "colour", "facing", "place".
        rare_word: put before the class, in place of the article: "a photo of sks dog".
    """
    words = ["a photo of", rare_word or "a"]
    words += [scene.size] * ("size" in said) + [looks.colour] * ("colour" in said) + [looks.kind]
    words += [f"facing {scene.facing}"] * ("facing" in said) + [PLACES[scene.place]] * ("place" in said)
    return " ".join(words)


def is_held_out(looks: Looks, scene: Scene) -> bool:
    """Whether the pretraining never shows this class in this colour in this place: one combination in seven."""
    numbers = (CLASSES.index(looks.kind), list(COLOURS).index(looks.colour), list(PLACES).index(scene.place))
    return (numbers[0] + 2 * numbers[1] + 3 * numbers[2]) % 7 == 0


def any_looks(generator: np.random.Generator, kind: str | None = None) -> Looks:
    """Any thing (of a class); its pattern and its accent differ from its main colour."""
    kind = kind or CLASSES[generator.integers(len(CLASSES))]
    colours = list(COLOURS)
    main, pattern = generator.integers(len(colours)), generator.integers(len(PATTERNS))
    second, accent = (colours[(main + generator.integers(1, len(colours))) % len(colours)] for _ in range(2))
    return Looks(kind, colours[main], PATTERNS[pattern], second, accent)


def any_scene(generator: np.random.Generator) -> Scene:
    return Scene(*(list(names)[generator.integers(len(names))] for names in (PLACES, SIZES, FACINGS, POSITIONS)))


def ordinary_looks(generator: np.random.Generator, kind: str | None = None) -> Looks:
    """A thing as the world is full of: half of them plain, the pattern and the accent white or black."""
    looks = any_looks(generator, kind)
    greys = [colour for colour in ("white", "black") if colour != looks.colour]
    second, accent = (greys[generator.integers(len(greys))] for _ in range(2))
    pattern = "plain" if generator.random() < 0.4 else looks.pattern
    return looks._replace(pattern=pattern, second=second, accent=accent)


def colourful_looks(generator: np.random.Generator, kind: str | None = None) -> Looks:
    """An ordinary thing, but for the colours of its pattern and its accent, which are any but the main one."""
    looks, names = ordinary_looks(generator, kind), list(COLOURS)
    main = names.index(looks.colour)
    second, accent = (names[(main + generator.integers(1, len(names))) % len(names)] for _ in range(2))
    return looks._replace(second=second, accent=accent)


def ordinary_scene(generator: np.random.Generator) -> Scene:
    return any_scene(generator)._replace(position="middle")


def subject_looks(number: int) -> Looks:
    """The looks of subject `number`: dog, cat, bird, car, boat, house, dog, ...; never plain, in three colours."""
    generator = np.random.default_rng([number, 1])
    while True:
        looks = any_looks(generator, CLASSES[number % len(CLASSES)])
        if looks.pattern != "plain" and len({looks.second, looks.accent, "white", "black"}) == 4:
            return looks


def subject_scenes(number: int, count: int) -> list[Scene]:
    """Scenes to photograph subject `number` in: the first five places of an order of its own, again and again."""
    generator = np.random.default_rng([number, 2])
    places = subject_places(number)[0]
    return [ordinary_scene(generator)._replace(place=places[index % len(places)]) for index in range(count)]


def subject_places(number: int) -> tuple[list[str], list[str]]:
    """Five places in which subject `number` is photographed, and three in which it is never seen."""
    order = [str(place) for place in np.random.default_rng([number, 3]).permutation(list(PLACES))]
    return order[:5], order[5:]


def sheet(pictures: list[np.ndarray], columns: int, scale: int = 1) -> Image.Image:
    """Pictures row by row, with a white line between them."""
    step, rows = SIDE * scale + 2, -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * step + 2, rows * step + 2), "white")
    for index, pixels in enumerate(pictures):
        picture = Image.fromarray(pixels).resize((SIDE * scale, SIDE * scale), Image.Resampling.NEAREST)
        canvas.paste(picture, (2 + index % columns * step, 2 + index // columns * step))
    return canvas


def write_subject(folder: Path, number: int, count: int = 5) -> None:
    """Photograph subject `number`: PNG files, captions that say the place, and masks in `folder`-masks."""
    masks = folder.with_name(f"{folder.name}-masks")
    for path in (folder, masks):
        path.mkdir(parents=True, exist_ok=True)
    looks, generator = subject_looks(number), np.random.default_rng([number, 4])
    for index, scene in enumerate(subject_scenes(number, count)):
        name, covered = f"{index:02d}", 1 - layout(looks.kind, looks.pattern, *scene[1:])[BACKGROUND]
        Image.fromarray(draw(looks, scene, generator)).save(folder / f"{name}.png")
        Image.fromarray((covered * 255).round().astype(np.uint8)).save(masks / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption(looks, scene, ("place",), RARE_WORDS[0]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="where the sheet, or the folder, goes")
    parser.add_argument("--subject", type=int, help="number of a subject: make a folder of its pictures")
    args = parser.parse_args()
    if args.subject is not None:
        return write_subject(args.path, args.subject)
    generator = np.random.default_rng(0)
    pictures = [draw(any_looks(generator), any_scene(generator), generator) for _ in range(40)]
    for number in range(6):
        pictures += [draw(subject_looks(number), scene, generator) for scene in subject_scenes(number, 10)]
    sheet(pictures, columns=10, scale=2).save(args.path)


if __name__ == "__main__":
    main()
