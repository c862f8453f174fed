"""Several resolutions, several cached crops, validation pictures of another size, a trigger word, flags in a file."""

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image

from conftest import Run, one_script

pytestmark = one_script

BASE = ["--pretrained_model_name_or_path=flux", "--instance_prompt=a dog"]


def dataset_of(script: ModuleType, folder: Path, *flags: str) -> Any:
    args = script.parse_args([*BASE, f"--instance_data_dir={folder}", *flags])
    return script.DreamBoothDataset(script.list_pictures(args)["instance"], [], args, 0)


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    """Pictures with the pixels for 32, for 32 and 48, and for all of 32, 48 and 64; and a wide one."""
    folder = tmp_path / "sizes"
    folder.mkdir()
    for name, size in {"a": (20, 33), "b": (50, 49), "c": (64, 80), "d": (200, 70)}.items():
        Image.effect_noise(size, 50).convert("RGB").save(folder / f"{name}.png")
    return folder


def test_each_picture_is_trained_at_every_resolution_that_it_has_pixels_for(script: ModuleType, sizes: Path) -> None:
    dataset = dataset_of(script, sizes, "--resolution=48,32,64", "--repeats=2")
    found = Counter((Path(picture.name).stem, size) for picture, size in
                    zip(dataset.sources["instance"], dataset.buckets, strict=True))  # fmt: skip
    wanted = {"a": [32], "b": [32, 48], "c": [32, 48, 64], "d": [32, 48, 64]}
    assert found == {(name, (side, side)): 2 for name, sides in wanted.items() for side in sides}


def test_with_buckets_each_resolution_has_its_shapes(script: ModuleType, sizes: Path) -> None:
    dataset = dataset_of(script, sizes, "--resolution=32,64", "--aspect_ratio_buckets=auto")
    found = {(Path(picture.name).stem, size) for picture, size in
             zip(dataset.sources["instance"], dataset.buckets, strict=True)}  # fmt: skip
    areas = {name: sorted(width * height for at, (width, height) in found if at == name) for name in "abcd"}
    assert [len(areas[name]) for name in "abcd"] == [1, 1, 2, 2]
    assert dict(found)["d"][0] > 2 * dict(found)["d"][1]  # the wide one stays wide
    schedule = script.MicroBatches(len(dataset), 2, 1, 0, 1, 0, 0, 4, dataset.buckets)
    for batch in schedule:
        assert len({dataset.buckets[key.example] for key in batch}) == 1


def test_a_run_of_several_resolutions_trains_them_all(
    script: ModuleType, run: Run, sizes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Counter[int]()
    training_loss = script.training_loss

    def record(transformer: Any, inputs: Any) -> Any:
        seen[inputs.latents.shape[-1] * 8] += 1
        return training_loss(transformer, inputs)

    monkeypatch.setattr(script, "training_loss", record)
    output = run(script, f"--instance_data_dir={sizes}", "--resolution=32,64", "--num_train_epochs=1",
                 "--max_train_steps=6", "--validation_prompt=a dog")  # fmt: skip
    assert seen == {32: 4, 64: 2}
    with Image.open(output / "image_0.png") as image:
        assert image.size == (32, 32)


def test_cached_views_are_as_many_crops_and_an_epoch_takes_one_of_them(
    script: ModuleType, run: Run, sizes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops: list[Any] = []
    prepare_inputs = script.prepare_inputs

    def record(run: Any, batch: dict[str, Any], *more: Any) -> Any:
        crop = batch["crop"]
        rows = zip(batch["keys"], crop.left.tolist(), crop.top.tolist(), crop.flip.tolist(), strict=True)
        crops.extend((key.example, *row) for key, *row in rows)
        return prepare_inputs(run, batch, *more)

    monkeypatch.setattr(script, "prepare_inputs", record)
    flags = [f"--instance_data_dir={sizes}", "--random_flip", "--cache_latents", "--max_train_steps=40"]
    for views, least, most in ((1, 4, 4), (3, 7, 12)):
        crops.clear()
        run(script, *flags, f"--cached_views={views}")
        assert least <= len(set(crops)) <= most and len(crops) == 40
    wide = Counter(crop for crop in crops if crop[0] == 3)
    assert len(wide) == 3 and min(wide.values()) >= 1  # of ten epochs


def test_the_first_of_several_cached_views_is_the_only_one_of_one(
    script: ModuleType, sizes: Path, tiny_flux: Path
) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_flux, subfolder="vae")
    flags = ("--resolution=32", "--cache_latents")
    one, several = (dataset_of(script, sizes, *flags, f"--cached_views={count}") for count in (1, 3))
    for dataset in (one, several):
        script.cache_latents(Accelerator(), vae, dataset)
    assert several.cached.keys() == {(*key[:3], view) for key in one.cached for view in range(3)}
    assert all(several.cached[key]["crop"] == loaded["crop"] for key, loaded in one.cached.items())
    assert len({several.cached["instance", 3, (32, 32), view]["crop"] for view in range(3)}) == 3


def test_validation_pictures_may_have_another_size(script: ModuleType, run: Run) -> None:
    flags = ["--validation_prompt=a dog", "--validation_resolution=64x32", "--validation_steps=2"]
    output = run(script, *flags)
    for name in ("image_0.png", "validation/step_000002_0.png"):
        with Image.open(output / name) as image:
            assert image.size == (64, 32)
    assert '"width": 64, "height": 32, "max_sequence_length": 16' in (output / "README.md").read_text()


def test_the_trigger_word_stands_in_prompts_and_in_front_of_captions(script: ModuleType, sizes: Path) -> None:
    for name, caption in {"a": "a dog who asks", "b": "a {trigger} dog", "c": "my sks dog"}.items():
        (sizes / f"{name}.txt").write_text(caption)
    flags = ["--caption_extension=.txt", "--trigger_word=sks", "--validation_prompt={trigger} at sea"]
    args = script.parse_args([*BASE, f"--instance_data_dir={sizes}", *flags, "--instance_prompt=a photo of {trigger}"])
    assert args.validation_prompt == ["sks at sea"]
    prompts = [picture.prompt for picture in script.list_pictures(args)["instance"]]
    assert prompts == ["sks a dog who asks", "a sks dog", "my sks dog", "a photo of sks"]


def test_flags_may_stand_in_a_file_and_every_run_writes_its_own(script: ModuleType, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.txt"
    file.write_text("# of the dog\n\n--max_train_steps=1   # enough\n--validation_prompt='a \"sks\" dog # 1'\n"
                    "--validation_prompt=b\n--resolution=32,64\n--center_crop\n--hub_token=hf_secret\n")  # fmt: skip
    output = run(script, f"@{file}")
    written = (output / "flags.txt").read_text()
    assert "hf_secret" not in written and "--center_crop\n" in written
    again = script.parse_args([f"@{output / 'flags.txt'}"])
    assert again.validation_prompt == ['a "sks" dog # 1', "b"] and again.resolution == [32, 64]
    assert script.flag_lines(again) == written.splitlines()
    run(script, "--max_train_steps=1", "--instance_prompt=ein süßer\nHund")
    assert (output / "earlier-1" / "flags.txt").read_text() == written
    assert script.parse_args([f"@{output / 'flags.txt'}"]).instance_prompt == "ein süßer Hund"
