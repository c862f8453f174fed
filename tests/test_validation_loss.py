"""The validation loss: fixed noise and sigmas, before the first step and at the validation interval."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxPipeline
from PIL import Image

from conftest import Run, one_script

pytestmark = one_script


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, float]]:
    """Step to what was logged of the validation loss at it."""
    steps: dict[int, dict[str, float]] = {}

    def log(_: Accelerator, values: dict[str, float], step: int) -> None:
        if "validation_loss" in values:
            steps[step] = values

    monkeypatch.setattr(Accelerator, "log", log)
    return steps


@torch.no_grad()
def plain_loss(checkpoint: Path, pictures: list[Path], guidance: float = 3.5) -> float:
    """The same number, picture by picture and sigma by sigma, through the pipeline's own parts."""
    import train_dreambooth_flux as script

    pipeline = FluxPipeline.from_pretrained(checkpoint)
    embeds, pooled, text_ids = pipeline.encode_prompt("a photo of sks dog", max_sequence_length=16)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 2, 2, "cpu", torch.float32)
    losses = []
    for number, path in enumerate(pictures):
        with Image.open(path) as stored:
            width, height = stored.size
            scale = 32 / min(width, height)
            resized = stored.convert("RGB").resize((int(width * scale), int(height * scale)), Image.Resampling.LANCZOS)
        left, top = round((resized.width - 32) / 2), round((resized.height - 32) / 2)
        pixels = pipeline.image_processor.preprocess(resized.crop((left, top, left + 32, top + 32)))
        mean = pipeline.vae.encode(pixels).latent_dist.mean
        latents = (mean - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
        for level in range(8):
            sigma = (2 * level + 1) / 16
            generator = script.generator_for(0, "validation", number, level)
            noise = torch.randn(16, 4, 4, generator=generator)[None]
            noisy = FluxPipeline._pack_latents(sigma * noise + (1 - sigma) * latents, 1, 16, 4, 4)
            velocity = pipeline.transformer(
                hidden_states=noisy, timestep=torch.tensor([sigma]), guidance=torch.tensor([guidance]),
                pooled_projections=pooled, encoder_hidden_states=embeds, txt_ids=text_ids, img_ids=image_ids,
            ).sample  # fmt: skip
            velocity = FluxPipeline._unpack_latents(velocity, 32, 32, 8)
            losses.append((velocity - (noise - latents)).square().mean().item())
    return sum(losses) / len(losses)


def test_it_is_the_mean_loss_of_the_centre_crops_at_eight_equally_spaced_sigmas(
    script: ModuleType, run: Run, logged: dict[int, dict[str, float]], tiny_flux: Path, pictures: Path
) -> None:
    run(script, "--validation_loss", "--guidance_scale=2", "--seed=5")
    expected = plain_loss(tiny_flux, sorted(pictures.iterdir()), guidance=2.0)
    assert logged[0]["validation_loss"] == pytest.approx(expected, rel=1e-5)


def test_it_is_logged_before_the_first_step_and_at_the_interval_relative_to_the_untrained_model(
    script: ModuleType, run: Run, logged: dict[int, dict[str, float]]
) -> None:
    flags = ["--validation_loss", "--validation_epochs=2", "--train_batch_size=5", "--max_train_steps=5"]
    run(script, *flags, "--learning_rate=1e-2")
    assert list(logged) == [0, 1, 3, 5]
    for values in logged.values():
        assert values["validation_loss_relative"] == values["validation_loss"] / logged[0]["validation_loss"]
    assert logged[5]["validation_loss_relative"] < 0.95


def test_held_out_pictures_take_the_place_of_those_of_the_training(
    script: ModuleType, run: Run, logged: dict[int, dict[str, float]], tiny_flux: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    Image.new("RGB", (40, 50), "navy").save(held_out / "navy.png")
    run(script, "--validation_loss", f"--validation_data_dir={held_out}")
    assert logged[0]["validation_loss"] == pytest.approx(plain_loss(tiny_flux, [held_out / "navy.png"]), rel=1e-5)


def test_a_resumed_run_stays_relative_to_the_untrained_model(
    script: ModuleType, run: Run, logged: dict[int, dict[str, float]]
) -> None:
    flags = ["--validation_loss", "--validation_epochs=1", "--train_batch_size=5", "--learning_rate=1e-2"]
    output = run(script, *flags, "--checkpointing_steps=1")
    untrained = logged[0]["validation_loss"]
    state = json.loads((output / "checkpoint-2" / script.STATE_FILE).read_text())["facts"]["state"]
    assert state["untrained_loss"] == untrained
    logged.clear()
    run(script, *flags, "--max_train_steps=3", "--resume_from_checkpoint=latest")
    assert list(logged) == [3]
    assert logged[3]["validation_loss_relative"] == logged[3]["validation_loss"] / untrained


def test_it_is_of_clip_as_it_is_trained(script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pooled, training_loss = list[torch.Tensor](), script.training_loss

    def record(transformer: Any, inputs: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            pooled.append(inputs.pooled_prompt_embeds.clone())
        return training_loss(transformer, inputs)

    monkeypatch.setattr(script, "training_loss", record)
    run(script, "--train_text_encoder", "--text_encoder_lr=1e-2", "--validation_loss", "--validation_steps=2")
    assert (pooled[-1] - pooled[0]).abs().max() > 1e-3
