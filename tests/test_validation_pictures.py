"""Validation pictures: when they are drawn, of which prompts, from which noise, and where they go."""

import functools
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


def test_validation_steps_draws_before_the_first_step_and_adds_to_the_epochs(script: ModuleType, run: Run) -> None:
    output = run(script, *TWO[::2], "--validation_steps=3", "--max_train_steps=6", "--train_batch_size=3")
    assert names(output) == [f"step_00000{step}_0.png" for step in (0, 2, 3, 6)]  # an epoch is two steps


def test_the_first_pictures_are_the_untrained_models(script: ModuleType, run: Run, tiny_flux: Path) -> None:
    flags = ("--validation_steps=9", "--max_train_steps=1", "--validation_guidance_scale=7", "--seed=4")
    output = run(script, *TWO, *flags, "--validation_resolution=48x32", "--num_validation_images=2")
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    options = {"num_inference_steps": 2, "guidance_scale": 7, "max_sequence_length": 16, "width": 48, "height": 32}
    for number, (prompt, noise) in enumerate(((DOG, 0), (DOG, 1), (CAT, 0), (CAT, 1))):
        generator = script.generator_for(4, "validation", noise)
        expected = np.asarray(pipeline(prompt, generator=generator, **options).images[0]).astype(float)
        drawn = pixels(output / "validation" / f"step_000000_{number}.png")
        assert np.abs(drawn - expected).max() <= 1
        other = pipeline(prompt, generator=generator.manual_seed(1), **options).images[0]
        assert np.abs(drawn - np.asarray(other).astype(float)).max() > 10


def test_drawing_changes_nothing_of_the_training(script: ModuleType, run: Run, tmp_path: Path) -> None:
    weights = []
    for name, flags in (("plain", ()), ("drawn", (*TWO, "--validation_steps=1", "--validation_loss"))):
        output = run(script, *flags, "--lr_scheduler=linear", f"--output_dir={tmp_path / name}")
        (file,) = {*output.glob("pytorch_lora_weights.safetensors"), *output.glob("transformer/*.safetensors")}
        weights.append(load_file(file))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_skip_final_inference_draws_no_pictures_of_the_result(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "draw_final_pictures", lambda *_: pytest.fail("the result was loaded"))
    output = run(script, *TWO, "--skip_final_inference", "--validation_steps=2")
    assert names(output) == ["step_000000_0.png", "step_000000_1.png", "step_000002_0.png", "step_000002_1.png"]
    assert "image_0.png" not in (output / "README.md").read_text()


def test_wandb_gets_pictures_tensorboard_an_array_and_other_trackers_nothing(script: ModuleType) -> None:
    got: dict[str, Any] = {}
    trackers = []
    for name in ("wandb", "tensorboard", "aim"):
        log = functools.partial(lambda name, values, step, **_: got.update({name: values["test"]}), name)
        trackers.append(SimpleNamespace(name=name, log_images=log))
    drawn = [Image.new("RGB", (8, 16)), Image.new("RGB", (8, 16), "red")]
    script.log_pictures(SimpleNamespace(trackers=trackers), "test", drawn, 3)
    assert got.pop("wandb") == drawn and got.pop("tensorboard").shape == (2, 16, 8, 3) and got == {}


@both_scripts
def test_the_final_pictures_are_those_of_the_last_validation(script: ModuleType, run: Run) -> None:
    """So they are of what was trained, CLIP too, read from the file; not of the base."""
    flags = ("--validation_steps=4", "--max_train_steps=4", "--learning_rate=3e-2", "--upcast_before_saving")
    output = run(script, *TWO[::2], *flags, "--train_text_encoder", "--text_encoder_lr=3e-2", "--cache_latents")
    first, last, final = (
        pixels(output / name)
        for name in ("validation/step_000000_0.png", "validation/step_000004_0.png", "image_0.png")
    )
    assert np.abs(final - last).max() <= 2 < 5 < np.abs(final - first).max()
