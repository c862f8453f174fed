"""The validation loss: fixed noise and sigmas, before the first step and at the validation interval."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

import train_dreambooth_flux
from conftest import Run, one_script

pytestmark = one_script


@torch.no_grad()
def plain_loss(checkpoint: Path, pictures: list[Path], guidance: float) -> float:
    """The same number, picture by picture and sigma by sigma, through the pipeline's own parts."""
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
            generator = train_dreambooth_flux.generator_for(0, "validation", number, level)
            noise = torch.randn(16, 4, 4, generator=generator)[None]
            noisy = FluxPipeline._pack_latents(sigma * noise + (1 - sigma) * latents, 1, 16, 4, 4)
            velocity = pipeline.transformer(
                hidden_states=noisy, timestep=torch.tensor([sigma]), guidance=torch.tensor([guidance]),
                pooled_projections=pooled, encoder_hidden_states=embeds, txt_ids=text_ids, img_ids=image_ids,
            ).sample  # fmt: skip
            velocity = FluxPipeline._unpack_latents(velocity, 32, 32, 8)
            losses.append((velocity - (noise - latents)).square().mean().item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("held_out", [False, True])
def test_it_is_the_mean_loss_of_the_centre_crops_at_eight_equally_spaced_sigmas(
    script: ModuleType, run: Run, logged: list[dict], tiny_flux: Path, pictures: Path, tmp_path: Path, held_out: bool
) -> None:
    flags, folder = ["--validation_loss", "--guidance_scale=2", "--seed=5", "--random_flip"], pictures
    if held_out:
        folder = tmp_path / "held_out"
        folder.mkdir()
        Image.linear_gradient("L").resize((40, 50)).save(folder / "grey.png")
        flags.append(f"--validation_data_dir={folder}")
    run(script, *flags)
    expected = plain_loss(tiny_flux, sorted(folder.iterdir()), guidance=2.0)
    assert logged[0] == {"validation_loss": pytest.approx(expected, rel=1e-5), "step": 0}


def test_it_is_logged_before_the_first_step_and_at_the_interval_and_falls(
    script: ModuleType, run: Run, logged: list[dict]
) -> None:
    flags = ["--validation_loss", "--validation_epochs=2", "--train_batch_size=5", "--max_train_steps=5"]
    run(script, *flags, "--learning_rate=1e-2")
    found = {values["step"]: values["validation_loss"] for values in logged if "validation_loss" in values}
    assert list(found) == [0, 1, 3, 5] and found[5] < 0.95 * found[0]


def test_it_is_of_clip_as_it_is_trained(script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pooled, training_loss = list[torch.Tensor](), script.training_loss

    def record(transformer: Any, inputs: Any) -> dict[str, torch.Tensor]:
        if not torch.is_grad_enabled():
            pooled.append(inputs.pooled_prompt_embeds.clone())
        return training_loss(transformer, inputs)

    monkeypatch.setattr(script, "training_loss", record)
    run(script, "--train_text_encoder", "--text_encoder_lr=1e-2", "--validation_loss", "--validation_steps=2")
    assert (pooled[-1] - pooled[0]).abs().max() > 1e-3
