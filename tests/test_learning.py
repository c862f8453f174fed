"""Both scripts learn, and what they save is what they learned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

import train_dreambooth_lora_flux as script
from benchmarks import learning
from conftest import reset_accelerate

Trained = tuple[list[learning.Point], Path, torch.Tensor]


def test_the_full_script_overfits_until_the_pipeline_draws_the_picture_from_noise(
    tiny_flux: Path, tmp_path: Path
) -> None:
    points = learning.overfit_one_picture(tiny_flux, tmp_path, steps=350, points=1)
    untrained, saved = points[0].cosine, points[-1].cosine
    assert untrained is not None and saved is not None
    assert abs(untrained) < 0.3 and saved > 0.75


@torch.no_grad()
def predict(pipeline: FluxPipeline) -> torch.Tensor:
    """The velocity for fixed noise and a fixed prompt, which goes through both text encoders."""
    embeds, pooled, text_ids = pipeline.encode_prompt(learning.PROMPT, max_sequence_length=learning.TEXT_LENGTH)
    return pipeline.transformer(
        hidden_states=torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)),
        timestep=torch.tensor([0.6]), guidance=torch.tensor([3.5]), encoder_hidden_states=embeds,
        pooled_projections=pooled, txt_ids=text_ids, img_ids=script.make_image_ids(4, 4),
    ).sample  # fmt: skip


@pytest.fixture(scope="module")
def trained_lora(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Loss over steps, output folder, and what the live model predicts just before it is saved."""
    reset_accelerate()
    folder = tmp_path_factory.mktemp("lora")
    live: list[torch.Tensor] = []
    save_result = script.save_result

    def record(run: Any) -> None:
        transformer, clip = (script.unwrap(model).eval() for model in run.models)
        live.append(predict(FluxPipeline.from_pretrained(tiny_flux, transformer=transformer, text_encoder=clip)))
        save_result(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "save_result", record)
        points = learning.train_lora(tiny_flux, folder, steps=200, points=4)
    reset_accelerate()
    return points, folder / "lora", live[0]


def test_the_lora_script_lowers_the_held_out_loss(trained_lora: Trained) -> None:
    points = trained_lora[0]
    assert points[0].step == 0 and points[-1].step > 150 and points[-1].loss < 0.6 * points[0].loss


def test_the_saved_adapters_predict_what_the_live_model_predicts_with_clips_and_not_without(
    tiny_flux: Path, trained_lora: Trained
) -> None:
    _, output, live = trained_lora
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    untrained = predict(pipeline)
    pipeline.load_lora_weights(output, weight_name=script.LORA_FILE)
    assert (predict(pipeline) - live).abs().max() < 1e-5 < 0.1 < (untrained - live).abs().max()
    pipeline.text_encoder.disable_adapters()
    assert (predict(pipeline) - live).abs().max() > 1e-3
