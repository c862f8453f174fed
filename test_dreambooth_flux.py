"""The full script end to end on a tiny random checkpoint: launched as users launch it, and its result loaded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_flux as script
from conftest import Run, launch

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def launched(tiny_flux: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one run under `accelerate launch`."""
    output = tmp_path_factory.mktemp("launched") / "out"
    flags = [
        f"--pretrained_model_name_or_path={tiny_flux}", f"--instance_data_dir={pictures}", f"--output_dir={output}",
        "--instance_prompt=a photo of sks dog", "--resolution=32", "--train_batch_size=2", "--num_train_epochs=2",
        "--learning_rate=1e-3", "--train_text_encoder", "--text_encoder_lr=1e-3", "--checkpointing_steps=3",
        "--validation_prompt=a sks dog", "--validation_epochs=2",
        "--validation_num_inference_steps=4", "--num_validation_images=1", "--seed=0",
    ]  # fmt: skip
    launch(script, flags, output.parent)
    return output


def test_the_pipeline_folder_loads_and_draws_another_picture(launched: Path, tiny_flux: Path) -> None:
    pictures = []
    for folder in (tiny_flux, launched):
        pipeline = FluxPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        options = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "np"}
        pictures.append(pipeline("a dog", generator=torch.Generator().manual_seed(0), **options).images)
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-3


def test_every_weight_of_the_transformer_and_clip_is_trained(launched: Path, tiny_flux: Path) -> None:
    for name in (WEIGHTS, "text_encoder/model.safetensors"):
        before, after = load_file(tiny_flux / name), load_file(launched / "checkpoint-6" / name)
        same = [key for key in before if torch.equal(before[key], after[key])]
        # A position that no prompt reaches, and a bias that shifts all keys alike, get no gradient and do not decay.
        assert [key for key in same if not key.endswith("k_proj.bias")] == []


def test_t5_and_the_vae_are_the_base_models(launched: Path, tiny_flux: Path) -> None:
    t5 = "text_encoder_2/model.safetensors"
    before, after = load_file(tiny_flux / t5), load_file(launched / t5)
    assert all(torch.equal(before[key], after[key]) for key in before)
    vae = "vae/diffusion_pytorch_model.safetensors"
    before, after = load_file(tiny_flux / vae), load_file(launched / vae)
    assert all(torch.equal(before[key].bfloat16(), after[key]) for key in before)


def test_the_result_has_the_precision_of_the_training_and_checkpoints_float32(launched: Path) -> None:
    for name in (WEIGHTS, "text_encoder/model.safetensors"):
        result, checkpoint = load_file(launched / name), load_file(launched / "checkpoint-6" / name)
        assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16}
        assert {tensor.dtype for tensor in checkpoint.values()} == {torch.float32}
        result = {key.removeprefix("text_model."): value for key, value in result.items()}
        assert all(torch.equal(result[key], value.bfloat16()) for key, value in checkpoint.items())


def test_pictures_are_drawn_on_the_way_and_at_the_end(launched: Path) -> None:
    assert [path.name for path in (launched / "validation").iterdir()] == ["step_000003_0.png"]
    with Image.open(launched / "image_0.png") as image:
        assert image.size == (32, 32) and len(set(image.getdata())) > 100


def test_upcast_before_saving_saves_float32(run: Run) -> None:
    state = load_file(run(script, "--mixed_precision=bf16", "--upcast_before_saving") / WEIGHTS)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in state.values())
