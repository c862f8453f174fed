"""Files that load elsewhere: what the loaders make of them is the model that was trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel

import train_dreambooth_flux as full_script
import train_dreambooth_lora_flux as script
from conftest import Run

SCALED = ("--rank=4", "--lora_alpha=16", "--learning_rate=1e-2", "--train_text_encoder", "--text_encoder_lr=1e-2")


def draw(pipeline: FluxPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "np"}
    return pipeline("a photo of sks dog", generator=torch.Generator().manual_seed(0), **options).images


def test_diffusers_draws_with_the_file_what_the_live_model_draws(
    run: Run, tiny_flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[np.ndarray] = []
    save = script.save_result

    def record(run: Any) -> None:
        transformer, text_encoder = (model.eval() for model in run.models)
        drawn.append(draw(FluxPipeline.from_pretrained(tiny_flux, transformer=transformer, text_encoder=text_encoder)))
        save(run)

    monkeypatch.setattr(script, "save_result", record)
    output = run(script, *SCALED, "--max_train_steps=4")
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    before = draw(pipeline)
    pipeline.load_lora_weights(output, weight_name="pytorch_lora_weights.safetensors")
    assert np.abs(draw(pipeline) - before).max() > 0.05 and np.abs(draw(pipeline) - drawn[0]).max() < 1e-4


def metadata(folder: Path) -> dict[str, Any]:
    with safe_open(folder / script.LORA_FILE, "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def test_the_result_needs_no_metadata_and_a_checkpoint_keeps_what_is_trained(run: Run) -> None:
    """In the result the scale is in B, for programs that read no metadata; a checkpoint's B is the trained one."""
    output = run(script, *SCALED, "--checkpointing_steps=2", "--upcast_before_saving")
    checkpoint = output / "checkpoint-2"
    result, trained = (load_file(folder / script.LORA_FILE) for folder in (output, checkpoint))
    assert result.keys() == trained.keys()
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, trained[name] * (4.0 if "lora_B" in name else 1.0))
    assert any(tensor.abs().max() > 0 for name, tensor in result.items() if "lora_B" in name)
    for part in ("transformer", "text_encoder"):
        assert metadata(output)[f"{part}.lora_alpha"] == metadata(output)[f"{part}.r"] == 4
        assert metadata(checkpoint)[f"{part}.lora_alpha"] == 16
    # Another version of peft refuses fields that it does not know; these all versions know.
    known = {
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "use_rslora",
        "use_dora",
        "lora_bias",
    }
    assert {name.split(".")[1] for name in metadata(output) | metadata(checkpoint)} == known
    # CLIP's layers are called as transformers 4 and other programs call them.
    names = [name for name in result if name.startswith("text_encoder.")]
    assert names and all(name.startswith("text_encoder.text_model.encoder.layers.") for name in names)


def test_a_pipeline_that_was_saved_has_clips_names_of_transformers_4(run: Run) -> None:
    """Which takes others for missing weights, and goes on with random ones; transformers 5 reads both."""
    output = run(full_script, "--train_text_encoder", "--checkpointing_steps=2", "--upcast_before_saving")
    saved = load_file(output / "text_encoder" / "model.safetensors")
    trained = load_file(output / "checkpoint-2" / "text_encoder" / "model.safetensors")
    assert saved.keys() == {f"text_model.{name}" for name in trained}
    loaded = CLIPTextModel.from_pretrained(output / "text_encoder").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())


def test_the_single_file_is_the_transformer_in_bfloat16(run: Run, tmp_path: Path) -> None:
    output = run(full_script, "--save_single_file", "--learning_rate=1e-2")
    expected = FluxTransformer2DModel.from_pretrained(output / "transformer", dtype=torch.bfloat16)
    got = FluxTransformer2DModel.from_single_file(
        str(output / full_script.SINGLE_FILE), config=str(output), subfolder="transformer", dtype=torch.bfloat16
    )
    for (name, one), (_, other) in zip(got.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(one, other) and one.dtype == torch.bfloat16, name
    plain = run(full_script, "--max_train_steps=1", f"--output_dir={tmp_path / 'plain'}")
    assert not (plain / full_script.SINGLE_FILE).exists()
