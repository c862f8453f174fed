"""Both scripts learn, and what they save is what they learned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

import train_dreambooth_lora_flux as lora_script
from benchmarks import learning
from conftest import reset_accelerate


def test_the_full_script_overfits_until_the_pipeline_draws_the_picture_from_noise(
    tiny_flux: Path, tmp_path: Path
) -> None:
    reset_accelerate()
    points = learning.overfit_one_picture(tiny_flux, tmp_path, steps=500, points=1)
    untrained, saved = points[0].cosine, points[-1].cosine
    assert untrained is not None and saved is not None
    assert abs(untrained) < 0.3 and saved > 0.8


@pytest.fixture(scope="module")
def trained_lora(
    tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[learning.Point], Path, torch.Tensor]:
    """Loss over steps, output folder, and what the live model predicts just before it is saved."""
    reset_accelerate()
    folder = tmp_path_factory.mktemp("lora")
    live: list[torch.Tensor] = []
    original = lora_script.save_results

    def record(args: Any, accelerator: Any, trained: Any, dtype: torch.dtype) -> None:
        transformer, clip = (lora_script.unwrap(model).eval() for model in trained.models)
        live.append(predict(FluxPipeline.from_pretrained(tiny_flux, transformer=transformer, text_encoder=clip)))
        original(args, accelerator, trained, dtype)

    lora_script.save_results = record
    try:
        points = learning.train_lora(tiny_flux, folder, steps=200, points=4)
    finally:
        lora_script.save_results = original
        reset_accelerate()
    return points, folder / "lora", live[0]


@torch.no_grad()
def predict(pipeline: FluxPipeline) -> torch.Tensor:
    """The velocity for fixed noise and a fixed prompt, which goes through both text encoders."""
    embeds, pooled, _ = pipeline.encode_prompt(learning.PROMPT, max_sequence_length=learning.TEXT_LENGTH)
    noise = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    embeds, pooled = embeds.expand(2, -1, -1), pooled.expand(2, -1)
    guidance = torch.full((2,), 3.5)
    return lora_script.predict_velocity(pipeline.transformer, noise, torch.tensor([0.3, 0.8]), embeds, pooled, guidance)


def test_the_lora_script_lowers_the_held_out_loss(
    trained_lora: tuple[list[learning.Point], Path, torch.Tensor],
) -> None:
    points = trained_lora[0]
    assert points[0].step == 0 and points[-1].step > 150 and points[-1].loss < 0.6 * points[0].loss


def test_the_saved_adapters_predict_what_the_live_model_predicts(
    tiny_flux: Path, trained_lora: tuple[list[learning.Point], Path, torch.Tensor]
) -> None:
    _, output, live = trained_lora
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    untrained = predict(pipeline)
    pipeline.load_lora_weights(output, weight_name=lora_script.LORA_FILE)
    loaded = predict(pipeline)
    assert (loaded - live).abs().max() < 1e-5 < 0.1 < (untrained - live).abs().max()


def test_without_clips_adapter_the_prediction_would_differ(
    tiny_flux: Path, trained_lora: tuple[list[learning.Point], Path, torch.Tensor]
) -> None:
    _, output, live = trained_lora
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    pipeline.load_lora_weights(output, weight_name=lora_script.LORA_FILE)
    pipeline.text_encoder.disable_adapters()
    assert (predict(pipeline) - live).abs().max() > 1e-3
