"""Several resolutions: which pictures are trained at which, and that a run trains them all."""

from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from conftest import Run, one_script

pytestmark = one_script


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    """Pictures with the pixels for 32, for 32 and 48, and for all of 32, 48 and 64; and a wide one."""
    folder = tmp_path / "sizes"
    folder.mkdir()
    for name, size in {"a": (20, 33), "b": (50, 49), "c": (64, 80), "d": (200, 70)}.items():
        Image.effect_noise(size, 50).convert("RGB").save(folder / f"{name}.png")
    return folder


def trained_sizes(script: ModuleType, folder: Path, *flags: str) -> Counter[tuple[str, tuple[int, int]]]:
    base = ["--pretrained_model_name_or_path=flux", "--instance_prompt=a dog", f"--instance_data_dir={folder}"]
    args = script.parse_args([*base, *flags])
    dataset = script.DreamBoothDataset(script.list_pictures(args)["instance"], [], args, 0)
    names = (Path(picture.name).stem for picture in dataset.sources["instance"])
    return Counter(zip(names, dataset.buckets, strict=True))


def test_each_picture_is_trained_at_every_resolution_that_it_has_pixels_for(script: ModuleType, sizes: Path) -> None:
    wanted = {"a": [32], "b": [32, 48], "c": [32, 48, 64], "d": [32, 48, 64]}
    expected = {(name, (side, side)): 2 for name, sides in wanted.items() for side in sides}
    assert trained_sizes(script, sizes, "--resolution=48,32,64", "--repeats=2") == expected


def test_with_buckets_each_resolution_has_its_shapes(script: ModuleType, sizes: Path) -> None:
    found = trained_sizes(script, sizes, "--resolution=32,64", "--aspect_ratio_buckets=auto")
    for name, resolutions in {"a": [32], "b": [32], "c": [32, 64], "d": [32, 64]}.items():
        shapes = sorted(shape for other, shape in found if other == name)
        areas = [width * height / side**2 for (width, height), side in zip(shapes, resolutions, strict=True)]
        assert all(0.6 < area < 1.6 for area in areas)
        assert all((width > 2 * height) == (name == "d") for width, height in shapes)  # the wide one stays wide


def test_a_run_of_several_resolutions_trains_them_all_and_draws_at_the_first(
    script: ModuleType, run: Run, sizes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Counter[int]()
    loss = script.training_loss
    record = lambda *given: seen.update([given[1].latents.shape[-1] * 8]) or loss(*given)  # noqa: E731
    monkeypatch.setattr(script, "training_loss", record)
    flags = [f"--instance_data_dir={sizes}", "--resolution=32,64", "--max_train_steps=6", "--validation_prompt=a dog"]
    output = run(script, *flags)
    assert seen == {32: 4, 64: 2}
    with Image.open(output / "image_0.png") as image:
        assert image.size == (32, 32)
