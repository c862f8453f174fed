"""Which files are pictures, how each kind becomes upright RGB, and what of it is trained on."""

import functools
import itertools
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


def parse(script: ModuleType, *flags: str) -> Any:
    base = ["--pretrained_model_name_or_path=flux", "--instance_prompt=a sks dog", "--instance_data_dir=dogs"]
    return script.parse_args([*base, "--resolution=32", *flags])


def reopened(image: Image.Image, path: Path, **options: Any) -> Image.Image:
    image.save(path, **options)
    return Image.open(path)


def test_only_picture_files_of_the_folder_itself_are_taken_and_others_named(
    script: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = ["1.PNG", "a.jpg", "b.jpeg", "c.JPG", "d.webp", "e.bmp", "f.tiff", "g.gif"]
    for name in [".DS_Store", ".hidden.png", "._a.jpg", "phone.heic", "README.md", "jpg", *reversed(wanted)]:
        (tmp_path / name).write_bytes(b"")
    for folder in (".cache/huggingface", "more"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "z.png").write_bytes(b"")
    found = script.pictures_in_folder("--class_data_dir", str(tmp_path), "a dog", None, {})
    assert [(picture.name, *picture.prompts) for picture in found] == [(name, "a dog") for name in wanted]
    (warning,) = caplog.messages
    assert "--class_data_dir" in warning and warning.endswith(": README.md, jpg, more, phone.heic")


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


def test_what_is_transparent_shows_white(script: ModuleType, tmp_path: Path) -> None:
    palette = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(6, 4))
    palette.putpalette(COLOURS.reshape(-1).tolist(), "RGB")
    level = COLOURS[..., 0]
    key = np.full((6, 4), 255, np.uint8)
    key[0, 0] = 0
    kinds: dict[str, tuple[Image.Image, dict[str, Any], Pixels, Pixels]] = {  # options of the file, colours, alpha
        "RGBA": (Image.fromarray(np.dstack([COLOURS, ALPHA])), {}, COLOURS, ALPHA),
        "LA": (Image.fromarray(np.dstack([level, ALPHA]), "LA"), {}, np.dstack([level] * 3), ALPHA),
        "palette": (palette, {"transparency": bytes(ALPHA.reshape(-1).tolist())}, COLOURS, ALPHA),
        "one colour": (Image.fromarray(COLOURS), {"transparency": tuple(COLOURS[0, 0].tolist())}, COLOURS, key),
    }
    for kind, (image, options, colours, alpha) in kinds.items():
        got = np.asarray(script.to_rgb(reopened(image, tmp_path / "picture.png", **options)), dtype=float)
        share = alpha[..., None] / 255
        assert np.abs(got - (colours * share + 255 * (1 - share))).max() <= 1, kind  # rounded once


def test_every_kind_of_picture_keeps_its_colours(script: ModuleType, tmp_path: Path) -> None:
    palette = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(6, 4))
    palette.putpalette(COLOURS.reshape(-1).tolist(), "RGB")
    cmyk = RNG.integers(0, 256, (6, 4, 4), dtype=np.uint8)
    sixteen, grey = RAMP.astype(np.uint16), np.dstack([RAMP] * 3).astype(float)
    kinds: dict[str, tuple[Image.Image, str, NDArray[np.float64], float]] = {  # the file's ending, colours, error
        "RGB": (Image.fromarray(COLOURS), "png", COLOURS.astype(float), 0),
        "palette": (palette, "gif", COLOURS.astype(float), 0),
        "grey": (Image.fromarray(RAMP), "png", grey, 0),
        "1 bit": (Image.fromarray(RAMP > 99), "png", (grey > 99) * 255.0, 0),
        "CMYK": (Image.fromarray(cmyk, "CMYK"), "tiff", (255 - cmyk[..., :3]) * (1 - cmyk[..., 3:] / 255), 1),
        "16-bit grey": (Image.fromarray(sixteen * 257), "png", grey, 0),
        "16-bit grey, TIFF": (Image.fromarray(sixteen * 257), "tiff", grey, 0),
        "16-bit grey, never bright": (Image.fromarray(sixteen * 100), "png", grey * (100 / 257), 1),
        "16-bit grey, almost black": (Image.fromarray(sixteen), "png", grey / 257, 1),
    }
    for kind, (image, ending, expected, error) in kinds.items():
        got = script.to_rgb(reopened(image, tmp_path / f"picture.{ending}"))
        assert got.mode == "RGB" and got.size == image.size, kind
        assert np.abs(np.asarray(got) - expected).max() <= error, kind


def test_a_resized_picture_covers_its_size_and_exceeds_it_one_way_only(script: ModuleType) -> None:
    for size, resized in {(3024, 4032): (512, 682), (4032, 3024): (682, 512)}.items():  # 682.67
        assert script.resized_size(*size, (512, 512)) == resized
    rng = np.random.default_rng(1)
    for width, height, *size in np.c_[rng.integers(1, 5000, (500, 2)), rng.integers(1, 80, (500, 2)) * 16].tolist():
        resized = script.resized_size(width, height, tuple(size))
        assert all(side >= wanted for side, wanted in zip(resized, size, strict=True)) and set(resized) & set(size)
        scale = max(size[0] / width, size[1] / height)
        assert all(abs(got - scale * side) <= 1 for got, side in zip(resized, (width, height), strict=True))


def picture_of(script: ModuleType, pixels: Pixels) -> Any:
    return script.Picture("plain", functools.partial(Image.fromarray, pixels), ("a dog",), size=pixels.shape[1::-1])


def corners(script: ModuleType, height: int, width: int, *flags: str, drawn: bool = True) -> list[tuple]:
    """Left, top, and whether it is mirrored, of 200 crops to 32 x 32; the pixels say where they were."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    picture, args, found = picture_of(script, np.dstack([rows, columns, rows])), parse(script, *flags), []
    for key in range(200):
        generator = script.generator_for(key) if drawn else None
        pixels = script.load_picture(picture, (32, 32), args, generator)["pixels"]
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
        top, left = ((pixels[:2] + 1) * 127.5).round().int().amin((1, 2)).tolist()
        mirrored = bool(pixels[1, 0, 0] > pixels[1, 0, -1])
        across = torch.arange(left, left + 32)
        assert torch.allclose((pixels[1] + 1) * 127.5, (across.flip(0) if mirrored else across).float(), atol=1e-3)
        found.append((left, top, mirrored))
    return found


def test_random_crops_lie_inside_reach_every_place_and_are_mirrored_on_request_only(script: ModuleType) -> None:
    assert set(corners(script, 32, 35)) == {(left, 0, False) for left in range(4)}
    assert set(corners(script, 34, 32)) == {(0, top, False) for top in range(3)}


def test_a_centre_crop_leaves_the_same_on_both_sides_and_half_are_mirrored(script: ModuleType) -> None:
    for height, width, corner in ((32, 64, (16, 0)), (64, 32, (0, 16)), (32, 32, (0, 0))):
        assert set(corners(script, height, width, "--center_crop")) == {(*corner, False)}
        assert set(corners(script, height, width, "--random_flip", drawn=False)) == {(*corner, False)}
    counts = Counter(corners(script, 32, 48, "--center_crop", "--random_flip"))
    assert counts.keys() == {(8, 0, False), (8, 0, True)} and abs(counts[8, 0, True] - 100) < 36  # five deviations


def sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(math.pi * x) / (math.pi * x)


# Each mode's radius, and its weight at a distance; https://pillow.readthedocs.io/en/stable/handbook/concepts.html
KERNELS: dict[str, tuple[float, Callable[[float], float]]] = {
    "nearest": (0.2, lambda x: 1.0),  # at a third of the size the middle one of three
    "box": (0.5, lambda x: 1.0),
    "bilinear": (1, lambda x: 1 - x),
    "hamming": (1, lambda x: sinc(x) * (0.54 + 0.46 * math.cos(math.pi * x))),
    "bicubic": (2, lambda x: 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2),
    "lanczos": (3, lambda x: sinc(x) * sinc(x / 3)),
}


def test_the_interpolation_mode_is_the_filter_of_that_name(script: ModuleType) -> None:
    colours = np.random.default_rng(4).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    distances = np.abs(np.arange(48) + 0.5 - (np.arange(16)[:, None] + 0.5) * 3) / 3
    for mode, (radius, weight) in KERNELS.items():
        matrix = np.array([[weight(x) if x < radius else 0.0 for x in row] for row in distances.tolist()])
        matrix /= matrix.sum(1, keepdims=True)
        across = np.einsum("nw,hwc->hnc", matrix, colours).round().clip(0, 255)  # Pillow rounds in between as well
        expected = np.einsum("nh,hwc->nwc", matrix, across).clip(0, 255)
        args = parse(script, f"--image_interpolation_mode={mode}")
        pixels = script.load_picture(picture_of(script, colours), (16, 16), args)["pixels"]
        assert np.abs((pixels.permute(1, 2, 0).numpy() + 1) * 127.5 - expected).max() <= 1.5, mode  # two roundings


def test_whatever_a_decoder_raises_names_the_picture(
    script: ModuleType, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "to_rgb", lambda image: struct.unpack("i", b""))
    with pytest.raises(script.UsageError, match=r"dog_00\.png: unpack requires(.|\n)* dog_04\.png: unpack requires"):
        script.list_pictures(parse(script, f"--instance_data_dir={pictures}"))


def test_pictures_smaller_than_they_are_trained_are_named_and_kept(
    script: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, size in {"tall": (32, 80), "small": (31, 90), "wide": (64, 48)}.items():
        Image.effect_noise(size, 60).save(tmp_path / f"{name}.png")
    args = parse(script, f"--instance_data_dir={tmp_path}", "--resolution=32,48")
    dataset = script.DreamBoothDataset(script.list_pictures(args)["instance"], [], args, 0)
    names = [picture.name for picture in dataset.sources["instance"]]
    assert sorted(names) == ["small.png", "tall.png", "wide.png", "wide.png"]
    (warning,) = caplog.messages
    assert "small.png" in warning and "tall" not in warning and "wide" not in warning
    many = script.shorten([f"dog_{number}.png" for number in range(1000)])
    assert many.startswith("dog_0.png, dog_1.png") and many.endswith("[...]") and len(many) < 1000


def test_different_keys_draw_differently_and_the_same_key_the_same(script: ModuleType) -> None:
    keys: list[tuple[Any, ...]] = list(itertools.product(range(4), ("noise", "sigma"), range(10), range(10)))
    keys += [(1,), ("1",), (1, 1), ("1", 1), (11,), ("ab", "c"), ("a", "bc"), ("abc",), (0, -1), (-1, 0), (2**70,)]
    draws = torch.stack([torch.randn(64, generator=script.generator_for(*key)) for key in keys])
    assert (torch.corrcoef(draws) - torch.eye(len(keys))).abs().max() < 0.75  # six deviations of 1 / 8
    # Computed once: another process, which goes on from a checkpoint, must draw the same.
    assert script.generator_for(0, "order", 1).initial_seed() == 125578804223736978


def test_a_photo_is_decoded_once_for_all_epochs(script: ModuleType, pictures: Path) -> None:
    """Decoding a photo of 24 megapixels takes as long as a training step."""
    decoded: list[str] = []
    args = parse(script, f"--instance_data_dir={pictures}", "--random_flip")
    plain = script.list_pictures(args)["instance"][0]
    picture = replace(plain, open=lambda: (decoded.append(plain.name), plain.open())[1])
    crops = [script.load_picture(picture, (32, 32), args, script.generator_for(epoch))["pixels"] for epoch in range(9)]
    assert decoded == [plain.name] and len({crop.numpy().tobytes() for crop in crops}) > 1


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
    noise = script.generator_for(0, "class picture", "class_00002")
    expected = pipeline("a dog", height=32, width=32, max_sequence_length=16, generator=noise).images[0]
    assert np.abs(drawn["class_00002.png"] - np.asarray(expected).astype(int)).max() <= 1
    args = script.parse_args([*base_flags, *flags, "--num_class_images=3"])
    assert len(script.prepare_class_pictures(args, Accelerator(), 0)) == 3
