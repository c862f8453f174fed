"""The LoRA script end to end on a tiny random checkpoint: launched as users launch it, and its result loaded."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_dreambooth_lora_flux as script
from conftest import Run, launch

LORA = "pytorch_lora_weights.safetensors"


def read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a mapping)


def draw(pipeline: FluxPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "np"}
    return pipeline("a photo of sks dog", generator=torch.Generator().manual_seed(0), **options).images


@pytest.fixture(scope="module")
def launched(tiny_flux: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one run under `accelerate launch`."""
    output = tmp_path_factory.mktemp("launched") / "out"
    flags = [
        f"--pretrained_model_name_or_path={tiny_flux}", f"--instance_data_dir={pictures}", f"--output_dir={output}",
        "--instance_prompt=a photo of sks dog", "--resolution=32", "--train_batch_size=2", "--num_train_epochs=4",
        "--learning_rate=1e-2", "--rank=8", "--lora_alpha=16", "--train_text_encoder", "--text_encoder_lr=1e-2",
        "--checkpointing_steps=6", "--checkpoints_total_limit=1", "--validation_prompt=a sks dog",
        "--validation_epochs=2", "--validation_num_inference_steps=4", "--num_validation_images=2", "--seed=0",
        "--max_sequence_length=77",
    ]  # fmt: skip
    launch(script, flags, output.parent)
    return output


def test_the_saved_adapters_of_both_models_load_and_change_what_is_drawn(launched: Path, tiny_flux: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    before, text = draw(pipeline), pipeline.encode_prompt("a photo of sks dog", max_sequence_length=16)
    pipeline.load_lora_weights(launched, weight_name=LORA)
    assert np.abs(draw(pipeline) - before).max() > 1e-3
    after = pipeline.encode_prompt("a photo of sks dog", max_sequence_length=16)
    assert (after[1] - text[1]).abs().max() > 1e-3 and torch.equal(after[0], text[0])


def test_the_file_says_rank_alpha_and_targets(launched: Path) -> None:
    state, metadata = read_file(launched / LORA)
    for part in ("transformer", "text_encoder"):
        assert metadata[f"{part}.r"] == metadata[f"{part}.lora_alpha"] == 8  # the scale, 16 / 8, is in the weights
        down = [tensor for name, tensor in state.items() if name.startswith(part + ".") and "lora_A" in name]
        assert {tensor.shape[0] for tensor in down} == {8}
    assert set(metadata["transformer.target_modules"]) == set(script.TRANSFORMER_TARGETS)


def test_the_result_has_the_precision_of_the_training_and_the_one_checkpoint_kept_float32(launched: Path) -> None:
    assert [path.name for path in launched.glob("checkpoint-*")] == ["checkpoint-12"]
    assert {tensor.dtype for tensor in read_file(launched / LORA)[0].values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in read_file(launched / "checkpoint-12" / LORA)[0].values()} == {torch.float32}


def test_pictures_are_drawn_after_epochs_1_and_3_and_at_the_end(launched: Path) -> None:
    expected = {f"step_{step:06d}_{number}.png" for step in (3, 9) for number in (0, 1)}
    assert {path.name for path in (launched / "validation").iterdir()} == expected
    for path in (launched / "image_0.png", launched / "image_1.png"):
        with Image.open(path) as image:
            assert image.size == (32, 32) and image.mode == "RGB" and len(set(image.getdata())) > 100


def test_the_tracker_has_curves_and_pictures(launched: Path) -> None:
    curves: dict[str, list[float]] = {}
    images: set[str] = set()
    for folder in {path.parent for path in launched.rglob("*tfevents*")}:
        events = EventAccumulator(str(folder)).Reload()
        curves |= {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        images |= set(events.Tags()["images"])
    assert len(curves["loss"]) == 12 and np.isfinite(curves["loss"]).all() and len(set(curves["loss"])) == 12
    assert np.allclose(curves["lr"], 1e-2) and min(curves["grad_norm"]) > 0 and min(curves["step_time"]) > 0
    assert {tag.split("/")[0] for tag in images} == {"validation", "test"}


def test_lora_layers_chooses_what_is_trained(run: Run) -> None:
    state, _ = read_file(run(script, "--lora_layers=attn.to_k, ff.net.2") / LORA)
    layers = {name.split(".lora_")[0].split(".", 3)[-1] for name in state}
    assert layers == {"attn.to_k", "ff.net.2"}


def test_a_layer_that_does_not_exist_is_named(run: Run) -> None:
    with pytest.raises(script.UsageError, match=r"--lora_layers: no linear layer's name ends in attn\.to_z"):
        run(script, "--lora_layers=attn.to_q,attn.to_z")
