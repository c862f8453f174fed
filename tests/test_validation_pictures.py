"""Validation pictures: when they are drawn, of which prompts, from which noise, and the sheet that shows them all."""

import itertools
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file

from conftest import Run, both_scripts, one_script

pytestmark = one_script

DOG, CAT = "a photo of sks dog", "a photo of a cat in a bucket"
TWO = (f"--validation_prompt={DOG}", f"--validation_prompt={CAT}", "--validation_num_inference_steps=2")


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "validation").iterdir())


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def cell(output: Path, row: int, column: int) -> np.ndarray:
    """The inside of a cell of the contact sheet: 256 pixels wide, beside the steps and under the prompts."""
    return pixels(output / "contact_sheet.jpg")[48 + 256 * row :, 64 + 256 * column :][20:236, 20:236]


def trained_weights(output: Path) -> dict[str, torch.Tensor]:
    (file,) = {*output.glob("pytorch_lora_weights.safetensors"), *output.glob("transformer/*.safetensors")}
    return load_file(file)


def assert_shows(output: Path, row: int, column: int, name: str) -> None:
    """A cell has the colours of a picture, and not those of another one."""
    with Image.open(output / "validation" / name) as image:
        expected = np.asarray(image.resize((252, 252), Image.Resampling.BICUBIC)).astype(float)[18:234, 18:234]
    assert np.abs(cell(output, row, column) - expected).mean() < 4


def test_validation_steps_draws_before_the_first_step_and_then_every_so_many(script: ModuleType, run: Run) -> None:
    output = run(script, *TWO[::2], "--validation_steps=2", "--max_train_steps=4")
    assert names(output) == [f"step_00000{step}_0.png" for step in (0, 2, 4)]


def test_validation_steps_adds_to_validation_epochs(script: ModuleType, run: Run) -> None:
    output = run(script, *TWO[::2], "--validation_steps=3", "--max_train_steps=3", "--train_batch_size=3")
    assert names(output) == [f"step_00000{step}_0.png" for step in (0, 2, 3)]  # an epoch is two steps


def test_the_first_pictures_are_the_untrained_models(script: ModuleType, run: Run, tiny_flux: Path) -> None:
    output = run(script, *TWO, "--validation_steps=9", "--max_train_steps=1", "--validation_guidance_scale=7")
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    for number, prompt in enumerate((DOG, CAT)):
        options = {"num_inference_steps": 2, "guidance_scale": 7, "max_sequence_length": 16}
        noise = script.generator_for(0, "validation", 0)
        expected = pipeline(prompt, height=32, width=32, generator=noise, **options).images[0]
        drawn = pixels(output / "validation" / f"step_000000_{number}.png")
        assert np.abs(drawn - np.asarray(expected).astype(float)).max() <= 1
        other = pipeline(prompt, height=32, width=32, generator=noise.manual_seed(1), **options).images[0]
        assert np.abs(drawn - np.asarray(other).astype(float)).max() > 10


@pytest.mark.parametrize("flag", ["--validation_guidance_scale=1", "--validation_num_inference_steps=3"])
def test_guidance_and_sampling_steps_change_the_picture_and_not_the_training(
    script: ModuleType, run: Run, tmp_path: Path, flag: str
) -> None:
    outputs = [
        run(script, *TWO[::2], "--validation_steps=1", f"--output_dir={tmp_path / name}", *flags)
        for name, flags in (("one", []), ("other", [flag]))
    ]
    for name in ("validation/step_000000_0.png", "image_0.png"):
        one, other = (pixels(output / name) for output in outputs)
        assert np.abs(one - other).max() > 2
    one, other = (trained_weights(output) for output in outputs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_each_prompt_gets_its_pictures_from_the_same_noise(script: ModuleType, run: Run) -> None:
    flags = [f"--validation_prompt={prompt}" for prompt in (DOG, CAT, DOG)]
    output = run(script, *flags, "--num_validation_images=2", "--validation_num_inference_steps=2")
    drawn = [pixels(output / f"image_{number}.png") for number in range(6)]
    assert not (output / "image_6.png").exists()
    for number in (0, 1):
        assert np.array_equal(drawn[number], drawn[number + 4])  # the same prompt and noise
        assert not np.array_equal(drawn[number], drawn[number + 2])  # another prompt
    assert not np.array_equal(drawn[0], drawn[1])  # other noise


def test_prompts_are_collected_and_empty_ones_are_none(script: ModuleType, base_flags: list[str]) -> None:
    for flags, prompts in (
        ([], None),
        (["--validation_prompt="], None),
        (["--validation_prompt=a, b"], ["a, b"]),
        (["--validation_prompt=a", "--validation_prompt", "b c"], ["a", "b c"]),
    ):
        assert script.parse_args([*base_flags, *flags]).validation_prompt == prompts


def test_skip_final_inference_draws_no_pictures_of_the_result(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "load_results", lambda *_: pytest.fail("the result was loaded"))
    output = run(script, *TWO, "--skip_final_inference", "--validation_steps=2")
    assert names(output) == ["step_000000_0.png", "step_000000_1.png", "step_000002_0.png", "step_000002_1.png"]
    assert not list(output.glob("image_*.png")) and "image_0.png" not in (output / "README.md").read_text()


def test_the_sheet_has_steps_down_and_prompts_across_and_goes_on_after_a_resume(
    script: ModuleType, run: Run, tmp_path: Path
) -> None:
    flags = [*TWO, "--validation_steps=1", "--learning_rate=1e-2", "--checkpointing_steps=1"]
    output = run(script, *flags, "--max_train_steps=1")
    assert pixels(output / "contact_sheet.jpg").shape == (48 + 2 * 256, 64 + 2 * 256, 3)
    run(script, *flags, "--max_train_steps=2", "--resume_from_checkpoint=latest")
    assert pixels(output / "contact_sheet.jpg").shape == (48 + 3 * 256, 64 + 2 * 256, 3)
    for step in (0, 1, 2):
        for number in (0, 1):
            assert_shows(output, step, number, f"step_00000{step}_{number}.png")


def sheet_of(script: ModuleType, base_flags: list[str], folder: Path, steps: list[int], until: int) -> Any:
    for step in steps:
        picture = folder / "validation" / f"step_{step:06d}_0.png"
        picture.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 32), (step % 256, 0, 255 - step % 256)).save(picture)
    args = script.parse_args([*base_flags, "--validation_prompt=a dog", f"--output_dir={folder}"])
    return script.draw_contact_sheet(args, until)


def test_the_sheet_leaves_out_pictures_of_later_steps_which_an_earlier_run_left(
    script: ModuleType, base_flags: list[str], tmp_path: Path
) -> None:
    sheet = sheet_of(script, base_flags, tmp_path, [0, 10, 20], 10)
    assert sheet.size == (64 + 256, 48 + 2 * 256)


def test_the_sheet_of_a_long_run_keeps_the_first_and_the_last_step_and_thins_evenly(
    script: ModuleType, base_flags: list[str], tmp_path: Path
) -> None:
    sheet = sheet_of(script, base_flags, tmp_path, list(range(0, 200, 2)), 199)
    assert sheet.size == (64 + 256, 48 + 32 * 256)
    colours = [sheet.getpixel((64 + 128, 48 + 256 * row + 60))[0] for row in range(32)]
    assert colours[0] == 0 and colours[-1] == 198
    gaps = {after - before for before, after in itertools.pairwise(colours)}
    assert gaps == {6, 8}


def test_a_picture_that_is_cut_off_while_it_is_written_is_not_there(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.save_picture(Image.new("RGB", (8, 8), "red"), tmp_path / "image_0.png")
    before = (tmp_path / "image_0.png").read_bytes()

    def fail(_: Image.Image, path: Path, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        script.save_picture(Image.new("RGB", (8, 8), "blue"), tmp_path / "image_0.png")
    assert (tmp_path / "image_0.png").read_bytes() == before
    script.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["image_0.png"]


def test_several_prompts_and_unset_flags_are_told_to_the_tracker(script: ModuleType, run: Run) -> None:
    """tensorboard takes no lists and no None in its table of settings."""
    prompts = ["--validation_prompt=a dog", "--validation_prompt=a cat"]
    output = run(script, *prompts, "--validation_num_inference_steps=1", "--report_to=tensorboard")
    written = b"".join(path.read_bytes() for path in output.glob("logs/**/*tfevents*"))
    assert b'["a dog", "a cat"]' in written


def test_a_tracker_gets_pictures_as_it_takes_them(script: ModuleType) -> None:
    """wandb takes them with captions, swanlab as a list; others, such as aim, one picture a name; some take none."""
    got: dict[str, dict] = {}
    trackers = [SimpleNamespace(name="mlflow")]
    for name in ("wandb", "swanlab", "aim"):
        method = "log" if name == "wandb" else "log_images"
        trackers.append(SimpleNamespace(name=name, **{method: lambda values, _, name=name: got.update({name: values})}))
    pictures = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "red")]
    args = SimpleNamespace(validation_prompt=["a dog", "a cat"], num_validation_images=1)
    script.log_pictures(args, SimpleNamespace(trackers=trackers), "test", pictures, 3)
    shown = got.pop("wandb")["test"]
    assert [image._caption for image in shown] == args.validation_prompt
    assert [image.image.getpixel((0, 0)) for image in shown] == [(0, 0, 0), (255, 0, 0)]
    assert got == {"swanlab": {"test": pictures}, "aim": {"test_0": pictures[0], "test_1": pictures[1]}}
    assert len(trackers) == 4


@both_scripts
def test_the_final_pictures_are_those_of_the_last_validation(script: ModuleType, run: Run) -> None:
    """So they are of what was trained, read from the file; not of the base."""
    flags = ("--validation_steps=4", "--max_train_steps=4", "--learning_rate=3e-2", "--upcast_before_saving")
    output = run(script, *TWO[::2], *flags)
    names = ("validation/step_000000_0.png", "validation/step_000004_0.png", "image_0.png")
    first, last, final = (pixels(output / name) for name in names)
    assert np.abs(final - last).max() <= 2 < 5 < np.abs(final - first).max()
