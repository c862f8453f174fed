"""Which files are pictures, how each kind becomes upright RGB, and what of it is trained on."""

import argparse
import itertools
import logging
import math
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxPipeline
from numpy.typing import NDArray
from PIL import Image

from conftest import Run, one_script

pytestmark = one_script

Pixels = NDArray[np.uint8]
RNG = np.random.default_rng(0)
COLOURS: Pixels = RNG.integers(0, 256, (6, 4, 3), dtype=np.uint8)
ALPHA: Pixels = RNG.integers(0, 256, (6, 4), dtype=np.uint8)
ALPHA[0], ALPHA[1] = 0, 255
RAMP: Pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey(values: Pixels) -> Pixels:
    return np.repeat(values[..., None], 3, axis=2)


def on_white(colours: Pixels, alpha: Pixels) -> NDArray[np.float64]:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def reopened(image: Image.Image, path: Path, **options: Any) -> Image.Image:
    image.save(path, **options)
    return Image.open(path)


def test_only_picture_files_of_the_folder_itself_are_listed(script: ModuleType, tmp_path: Path) -> None:
    wanted = ["1.PNG", "a.jpg", "b.jpeg", "c.JPG", "d.webp", "e.bmp", "f.tiff", "g.gif"]
    others = [".DS_Store", ".gitattributes", ".hidden.png", "._a.jpg", "a.txt", "metadata.jsonl", "README.md", "jpg"]
    for name in [*others, *reversed(wanted)]:
        (tmp_path / name).write_bytes(b"")
    for folder in (".cache/huggingface", "more", "folder.png"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "z.png").write_bytes(b"")
    assert [path.name for path in script.list_picture_files(tmp_path)] == wanted


def test_a_folder_becomes_pictures_with_its_prompt(script: ModuleType, pictures: Path) -> None:
    found = script.pictures_in_folder("--instance_data_dir", str(pictures), "a sks dog")
    assert [picture.name for picture in found] == [f"{pictures.name}/dog_{index:02d}.png" for index in range(5)]
    assert {picture.prompt for picture in found} == {"a sks dog"}
    for picture in found:
        with picture.open() as image, Image.open(pictures.parent / picture.name) as stored:
            assert np.array_equal(np.asarray(image), np.asarray(stored))


def test_a_folder_without_pictures_is_refused_by_flag_and_value(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "notes.txt").write_text("no picture")
    for folder in ("missing", "file", "without"):
        with pytest.raises(script.UsageError) as error:
            script.pictures_in_folder("--class_data_dir", str(tmp_path / folder), "a dog")
        assert "--class_data_dir" in str(error.value) and str(tmp_path / folder) in str(error.value)


# How a camera that was held so stores the upright picture: https://exiftool.org/TagNames/EXIF.html, 0x0112.
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def test_a_turned_photo_is_put_upright(script: ModuleType, tmp_path: Path) -> None:
    for orientation, store in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(np.ascontiguousarray(store(COLOURS)))
        upright = script.to_rgb(reopened(stored, tmp_path / "photo.png", exif=exif))
        assert np.array_equal(np.asarray(upright), COLOURS), orientation


def test_an_upright_photo_is_measured_upright(script: ModuleType, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = reopened(Image.new("RGB", (64, 48)), tmp_path / "photo.jpg", exif=exif)
    assert script.to_rgb(stored).size == (48, 64)


def transparent_pictures() -> dict[str, tuple[Image.Image, dict[str, Any], NDArray[np.float64]]]:
    """By kind: the picture, options of its file, and what it looks like on white paper."""
    rgba = np.dstack([COLOURS, ALPHA])
    level = COLOURS[..., 0]
    palette = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(6, 4))
    palette.putpalette(COLOURS.reshape(-1).tolist(), "RGB")
    key = np.full((6, 4), 255, np.uint8)
    key[0, 0] = 0
    level_key = np.where(level == level[2, 2], 0, 255).astype(np.uint8)
    entries = bytes(ALPHA.reshape(-1).tolist())
    return {
        "RGBA": (Image.fromarray(rgba), {}, on_white(COLOURS, ALPHA)),
        "LA": (Image.fromarray(np.dstack([level, ALPHA]), "LA"), {}, on_white(grey(level), ALPHA)),
        "palette, one entry": (palette, {"transparency": 0}, on_white(COLOURS, key)),
        "palette, entry by entry": (palette, {"transparency": entries}, on_white(COLOURS, ALPHA)),
        "RGB, one colour": (
            Image.fromarray(COLOURS), {"transparency": tuple(COLOURS[0, 0].tolist())}, on_white(COLOURS, key)
        ),
        "grey, one level": (
            Image.fromarray(level), {"transparency": int(level[2, 2])}, on_white(grey(level), level_key)
        ),
        "16-bit grey, one level": (
            Image.fromarray(level.astype(np.uint16) * 257),
            {"transparency": int(level[2, 2]) * 257},
            on_white(grey(level), level_key),
        ),
    }  # fmt: skip


def test_what_is_transparent_shows_white(script: ModuleType, tmp_path: Path) -> None:
    for kind, (image, options, expected) in transparent_pictures().items():
        got = np.asarray(script.to_rgb(reopened(image, tmp_path / "picture.png", **options)), dtype=float)
        assert np.abs(got - expected).max() <= 1, kind  # rounded once


def test_the_hidden_colour_leaves_no_trace(script: ModuleType, tmp_path: Path) -> None:
    hidden = np.dstack([COLOURS, np.zeros((6, 4), np.uint8)])
    assert np.asarray(script.to_rgb(reopened(Image.fromarray(hidden), tmp_path / "picture.png"))).min() == 255


def plain_pictures() -> dict[str, tuple[Image.Image, str, NDArray[np.float64]]]:
    """By kind: the picture, its file's ending, and its colours."""
    palette = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(6, 4))
    palette.putpalette(COLOURS.reshape(-1).tolist(), "RGB")
    bits = np.array([[True, False, True], [False, False, True]])
    cmyk = RNG.integers(0, 256, (6, 4, 4), dtype=np.uint8)
    ink = cmyk / 255
    sixteen = RAMP.astype(np.uint16) * 257
    dark = RAMP.astype(np.uint16) * 100
    ramp = grey(RAMP).astype(float)
    return {
        "RGB": (Image.fromarray(COLOURS), "png", COLOURS.astype(float)),
        "palette": (palette, "png", COLOURS.astype(float)),
        "palette, GIF": (palette, "gif", COLOURS.astype(float)),
        "grey": (Image.fromarray(RAMP), "png", ramp),
        "1 bit": (Image.fromarray(bits), "png", grey(bits.astype(np.uint8) * 255).astype(float)),
        "CMYK": (Image.fromarray(cmyk, "CMYK"), "tiff", 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])),
        "16-bit grey": (Image.fromarray(sixteen), "png", ramp),
        "16-bit grey, never above 255": (Image.fromarray(RAMP.astype(np.uint16)), "png", grey(RAMP) / 257),
        "16-bit grey, never bright": (Image.fromarray(dark), "png", grey(RAMP) * (100 / 257)),
        "16-bit grey, TIFF": (Image.fromarray(sixteen), "tiff", ramp),
        "16-bit grey, big end first": (Image.fromarray(sixteen.astype(">u2")), "tiff", ramp),
        "16 bits in 32": (Image.fromarray(sixteen.astype(np.int32)), "tiff", ramp),
        "8 bits in 32": (Image.fromarray(RAMP.astype(np.int32)), "tiff", ramp),
        "float up to 1": (Image.fromarray((RAMP / 255).astype(np.float32)), "tiff", ramp),
        "float up to 255": (Image.fromarray(RAMP.astype(np.float32)), "tiff", ramp),
    }


def test_every_kind_of_picture_keeps_its_colours(script: ModuleType, tmp_path: Path) -> None:
    for kind, (image, ending, expected) in plain_pictures().items():
        got = script.to_rgb(reopened(image, tmp_path / f"picture.{ending}"))
        assert got.mode == "RGB" and got.size == image.size, kind
        assert np.abs(np.asarray(got) - expected).max() <= (1 if "CMYK" in kind or "never" in kind else 0), kind


RESIZED = [  # size, resolution, and what it becomes
    ((100, 50), 32, (64, 32)),
    ((50, 100), 32, (32, 64)),
    ((70, 70), 32, (32, 32)),
    ((20, 10), 32, (64, 32)),
    ((101, 50), 32, (64, 32)),  # 64.64
    ((3024, 4032), 512, (512, 682)),  # 682.67
    ((512, 513), 512, (512, 513)),
]


def test_the_shorter_side_becomes_the_resolution(script: ModuleType) -> None:
    for size, resolution, resized in RESIZED:
        assert script.resized_size(*size, (resolution, resolution)) == resized


def test_resizing_keeps_the_aspect_to_a_pixel(script: ModuleType) -> None:
    for width, height in np.random.default_rng(1).integers(1, 5000, (500, 2)).tolist():
        resized = script.resized_size(width, height, (64, 64))
        assert min(resized) == 64
        assert max(resized) == 64 * max(width, height) // min(width, height)
        assert (resized[0] >= resized[1]) == (width >= height)


def drawn_crop(script: ModuleType, size: tuple[int, int], key: Any = "a", **flags: bool) -> Any:
    """The crop to 32 x 32 of a picture of `size` that a generator of `key` draws."""
    args = argparse.Namespace(**{"center_crop": False, "random_flip": False} | flags)
    return script.draw_crop(size, (32, 32), args, script.generator_for(key))


def cropped_pixels(script: ModuleType, image: Image.Image, size: tuple[int, int], at: Any, mode: str) -> torch.Tensor:
    """The pixels of a picture cropped to `size` at a corner, and mirrored or not."""
    pixels: torch.Tensor = script.to_pixels(script.crop_picture(image, script.Crop(size, *at), mode))
    return pixels


def test_a_centre_crop_leaves_the_same_on_both_sides(script: ModuleType) -> None:
    for size, corner in (((64, 32), (16, 0)), ((32, 64), (0, 16)), ((32, 32), (0, 0))):
        crop = drawn_crop(script, size, center_crop=True)
        assert (crop.left, crop.top) == corner, size
        assert crop == script.draw_crop(size, (32, 32), argparse.Namespace(), None)  # as the validation loss sees it


def test_a_centre_crop_of_an_odd_side_is_half_a_pixel_off(script: ModuleType) -> None:
    for width in (33, 35, 101):
        crop = drawn_crop(script, (width, 32), center_crop=True)
        assert abs(crop.left - (width - 32) / 2) == 0.5


def test_random_crops_lie_inside_and_reach_every_place(script: ModuleType) -> None:
    wide, tall = ([drawn_crop(script, size, key) for key in range(200)] for size in ((35, 32), (64, 66)))
    assert {crop.left for crop in wide} == {0, 1, 2, 3} and {crop.top for crop in wide} == {0}
    assert {crop.left for crop in tall} == {0} and {crop.top for crop in tall} == {0, 1}
    assert not any(crop.flip for crop in wide + tall)


@pytest.mark.parametrize("center_crop", [True, False])
def test_half_of_the_pictures_are_mirrored(script: ModuleType, center_crop: bool) -> None:
    crops = [drawn_crop(script, (48, 32), key, center_crop=center_crop, random_flip=True) for key in range(400)]
    assert abs(sum(crop.flip for crop in crops) - 200) < 50  # five standard deviations


def test_pixels_run_from_minus_one_to_one(script: ModuleType) -> None:
    pixels = script.to_pixels(Image.fromarray(grey(RAMP)))
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 16, 16)
    expected = (np.arange(256) - 127.5) / 127.5
    assert np.abs(pixels[1].reshape(-1).numpy() - expected).max() < 1e-6
    assert pixels.min() == -1 and pixels.max() == 1


def test_the_crop_is_what_is_trained(script: ModuleType) -> None:
    colours = np.random.default_rng(2).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    seen = cropped_pixels(script, Image.fromarray(colours), (16, 16), (5, 0, False), "bicubic")
    assert np.abs(seen.permute(1, 2, 0).numpy() - (colours[:, 5:21] / 127.5 - 1)).max() < 1e-6


def test_a_flip_mirrors_left_and_right(script: ModuleType) -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    plain, mirrored = (cropped_pixels(script, image, (16, 16), (0, 3, flip), "bilinear") for flip in (False, True))
    assert np.array_equal(mirrored.numpy(), plain.numpy()[..., ::-1])


def test_the_centre_of_the_picture_is_trained(script: ModuleType) -> None:
    colours = np.zeros((32, 96, 3), np.uint8)
    colours[:, 32:64] = 255
    crop = drawn_crop(script, (96, 32), center_crop=True)
    assert script.to_pixels(script.crop_picture(Image.fromarray(colours), crop, "nearest")).min() == 1


def sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(math.pi * x) / (math.pi * x)


def cubic(x: float) -> float:
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2


# Each mode's radius, and its weight at a distance; https://pillow.readthedocs.io/en/stable/handbook/concepts.html
KERNELS: dict[str, tuple[float, Callable[[float], float]]] = {
    "box": (0.5, lambda x: 1.0),
    "bilinear": (1, lambda x: 1 - x),
    "hamming": (1, lambda x: sinc(x) * (0.54 + 0.46 * math.cos(math.pi * x))),
    "bicubic": (2, cubic),
    "lanczos": (3, lambda x: sinc(x) * sinc(x / 3)),
}


def shrinking_matrix(mode: str, old: int, new: int) -> NDArray[np.float64]:
    """What resizes a line of `old` pixels to `new`: each new pixel's shares of the old ones, (new, old)."""
    scale = old / new
    if mode == "nearest":
        return np.array([[float(int((place + 0.5) * scale) == pixel) for pixel in range(old)] for place in range(new)])
    radius, weight = KERNELS[mode]
    matrix = np.zeros((new, old))
    for place in range(new):
        for pixel in range(old):
            distance = abs((pixel + 0.5 - (place + 0.5) * scale) / scale)
            matrix[place, pixel] = weight(distance) if distance < radius else 0
    return matrix / matrix.sum(1, keepdims=True)


def test_the_interpolation_mode_is_the_filter_of_that_name(script: ModuleType) -> None:
    colours = np.random.default_rng(4).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    for mode in ("nearest", *KERNELS):
        matrix = shrinking_matrix(mode, 48, 16)
        across = np.einsum("nw,hwc->hnc", matrix, colours).round().clip(0, 255)  # Pillow rounds in between as well
        expected = np.einsum("nh,hwc->nwc", matrix, across).clip(0, 255)
        pixels = cropped_pixels(script, Image.fromarray(colours), (16, 16), (0, 0, False), mode)
        got = (pixels.permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(got - expected).max() <= 1.5, mode  # the two roundings


def read_folder(script: ModuleType, folder: Path) -> list[Any]:
    return script.pictures_in_folder("--instance_data_dir", str(folder), "a sks dog")


@pytest.fixture
def with_broken_files(tmp_path: Path) -> Path:
    """A good picture between a truncated JPEG, a truncated PNG, a text and an empty file that are called pictures."""
    folder = tmp_path / "broken"
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png", "good.png"):
        noise.save(folder / name)
    for name in ("cut.jpg", "cut.png"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.webp").write_bytes(b"")
    return folder


def test_all_files_that_cannot_be_read_are_named_at_once(script: ModuleType, with_broken_files: Path) -> None:
    with pytest.raises(script.UsageError) as error:
        script.check_pictures(read_folder(script, with_broken_files))
    told = str(error.value)
    assert [name for name in ("cut.jpg", "cut.png", "text.png", "empty.webp") if name not in told] == []
    assert "good.png" not in told


def test_a_picture_with_a_broken_orientation_is_named(script: ModuleType, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "exif.png", exif=b"Exif\0\0not a TIFF header")
    with pytest.raises(script.UsageError, match=r"exif\.png"):
        script.check_pictures(read_folder(script, tmp_path))


@pytest.mark.parametrize(
    "flags",
    [
        "--with_prior_preservation --class_prompt=dog --num_class_images=3 --class_data_dir=",
        "--validation_loss --validation_data_dir=",
    ],
    ids=["class pictures", "held-out pictures"],
)
def test_other_broken_pictures_are_named_before_training(
    script: ModuleType, run: Run, with_broken_files: Path, flags: str
) -> None:
    with pytest.raises(script.UsageError, match=r"cut\.jpg(.|\n)*cut\.png"):
        run(script, *f"{flags}{with_broken_files}".split())


def test_good_pictures_pass_without_a_word(
    script: ModuleType, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        script.check_pictures(read_folder(script, pictures))
    assert caplog.messages == []


def report(script: ModuleType, folder: Path, caplog: pytest.LogCaptureFixture, side: int) -> list[str]:
    """The lines of the data report on a folder, trained at `side`."""
    with caplog.at_level(logging.INFO, script.__name__):
        script.report_pictures("instance", script.check_pictures(read_folder(script, folder)), [(side, side)])
    (message,) = caplog.messages
    return [line.strip() for line in message.splitlines()]


def test_small_pictures_are_named_and_kept(
    script: ModuleType, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (line,) = [line for line in report(script, pictures, caplog, 72) if "enlarged" in line]
    assert [name for name in range(5) if f"dog_{name:02d}.png" in line] == [0, 1, 4]  # sides of 64, 64, 80, 72 and 60


def test_the_report_tells_how_much_of_each_picture_the_crop_loses(
    script: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, size in {"tall": (32, 80), "square": (40, 40), "wide": (64, 48)}.items():
        Image.effect_noise(size, 60).save(tmp_path / f"{name}.png")
    first, *others = report(script, tmp_path, caplog, 32)
    folder = tmp_path.name
    assert first == "3 instance pictures"
    # 32 of 80 rows, 32 of 42 columns, everything; the worst first
    shares = f"{folder}/tall.png 60.0 %, {folder}/wide.png 23.8 %, {folder}/square.png 0.0 %"
    assert others == [f"32x32: 3, cropped by 27.9 %: {shares}"]


def test_long_lists_of_a_report_are_cut_and_counted(script: ModuleType) -> None:
    assert script.shorten(["a", "b", "c"], 3) == "a, b, c"
    assert script.shorten(["a", "b", "c"], 1) == "a and 2 more"


@pytest.mark.parametrize("repeats", [1, 3])
def test_an_epoch_has_each_picture_as_often_as_repeats_says(script: ModuleType, pictures: Path, repeats: int) -> None:
    args = argparse.Namespace(
        repeats=repeats, resolution=32, image_interpolation_mode="box", center_crop=True, random_flip=False,
        caption_dropout=0.0, aspect_ratio_buckets=None, mask_data_dir=None, alpha_mask=False,
    )  # fmt: skip
    dataset = script.DreamBoothDataset(read_folder(script, pictures), [], args, 0)
    schedule = script.MicroBatches(len(dataset), 2, 1, 0, 1, 0, 0, math.ceil(len(dataset) / 2))
    seen = Counter(dataset[key]["instance"]["pixels"].numpy().tobytes() for batch in schedule for key in batch)
    assert sorted(seen.values()) == [repeats] * 5


def test_the_same_key_draws_the_same(script: ModuleType) -> None:
    first, second = (torch.rand(64, generator=script.generator_for(7, "noise", 3, 5)) for _ in range(2))
    assert torch.equal(first, second)


def test_different_keys_draw_differently(script: ModuleType) -> None:
    keys: list[tuple[Any, ...]] = list(itertools.product(range(4), ("noise", "sigma"), range(10), range(10)))
    keys += [(1,), ("1",), (1, 1), ("1", 1), (11,), ("ab", "c"), ("a", "bc"), ("abc",), (0, -1), (-1, 0), (2**70,)]
    draws = [torch.randn(64, generator=script.generator_for(*key)) for key in keys]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(keys)


def test_draws_of_neighbouring_keys_are_independent(script: ModuleType) -> None:
    draws = torch.stack([torch.randn(256, generator=script.generator_for(0, "noise", place)) for place in range(64)])
    between = torch.corrcoef(draws) - torch.eye(64)
    assert between.abs().max() < 0.35  # 2,016 pairs: 5.6 standard deviations of 1 / 16
    assert abs(between.sum() / (64 * 63)) < 0.01


def test_drawing_leaves_the_global_generator_alone(script: ModuleType) -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    torch.rand(9, generator=script.generator_for(0, "noise"))
    assert torch.equal(torch.rand(4), expected)


def test_a_key_means_the_same_in_every_process(script: ModuleType) -> None:
    # Computed once. A checkpoint is continued by other processes: what they draw must not hang on hash(), say.
    assert script.generator_for(0, "order", 1).initial_seed() == 125578804223736978


def test_whatever_a_decoder_raises_names_the_picture(script: ModuleType) -> None:
    def fail() -> Image.Image:
        raise struct.error("required argument is not an integer")

    with pytest.raises(script.UsageError, match=r"odd\.avif: required argument"):
        script.check_pictures([script.Picture("odd.avif", fail, "a dog")])


def test_a_photo_is_decoded_once_for_all_epochs_and_each_crop_is_as_before(
    script: ModuleType, base_flags: list[str]
) -> None:
    """Decoding a photo of 24 megapixels takes as long as a training step."""
    decoded: list[str] = []
    args = script.parse_args([*base_flags, "--random_flip"])

    def counted(picture: Any) -> Any:
        return replace(picture, open=lambda: (decoded.append(picture.name), picture.open())[1])

    [plain, *_] = script.list_pictures(args)["instance"]
    picture = counted(plain)
    for epoch in range(3):
        loaded = script.load_picture(picture, (32, 32), args, script.generator_for(0, epoch))
        crop = loaded["crop"]
        expected = script.to_pixels(script.crop_picture(plain.read(), crop, "lanczos"))
        assert torch.equal(loaded["pixels"], expected)
    assert decoded == [picture.name]


def test_class_pictures_that_are_missing_are_drawn_each_from_its_own_noise(
    script: ModuleType, run: Run, base_flags: list[str], tiny_flux: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (40, 40), "navy").save(folder / "class_00001.png")
    flags = ["--with_prior_preservation", "--class_prompt=a dog", f"--class_data_dir={folder}", "--num_class_images=4"]
    run(script, *flags, "--sample_batch_size=2", "--max_train_steps=1")
    drawn = {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}
    assert list(drawn) == [f"class_{number:05d}.png" for number in range(4)]
    assert drawn["class_00001.png"].shape == (40, 40, 3) and len({one.tobytes() for one in drawn.values()}) == 4
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    pipeline.set_progress_bar_config(disable=True)
    noise = script.generator_for(0, "class picture", 2)
    expected = pipeline("a dog", height=32, width=32, max_sequence_length=16, generator=noise).images[0]
    assert np.abs(drawn["class_00002.png"] - np.asarray(expected).astype(int)).max() <= 1
    args = script.parse_args([*base_flags, *flags, "--num_class_images=3"])
    assert len(script.prepare_dataset(args, Accelerator(), script.list_pictures(args), 0).sources["class"]) == 3
