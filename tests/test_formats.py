"""Files that load elsewhere: what the loaders make of them is the model that was trained."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import train_dreambooth_flux as full_script
import train_dreambooth_lora_flux as script
from conftest import Run

PLAIN = ("--learning_rate=1e-2", "--rank=4", "--lora_alpha=16")
TRAINED = (*PLAIN, "--train_text_encoder", "--text_encoder_lr=1e-2")


def draw(pipeline: FluxPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "np"}
    return pipeline("a photo of sks dog", generator=torch.Generator().manual_seed(0), **options).images


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch, tiny_flux: Path) -> list[np.ndarray]:
    """What the live models draw when the result is saved."""
    drawn: list[np.ndarray] = []
    save = script.save_results

    def record(args: Any, accelerator: Any, trained: Any, dtype: Any) -> None:
        names = {"transformer": trained.transformer, "text_encoder": trained.text_encoder}
        models = {name: model.eval() for name, model in names.items() if model is not None}
        drawn.append(draw(FluxPipeline.from_pretrained(tiny_flux, **models)))
        save(args, accelerator, trained, dtype)

    monkeypatch.setattr(script, "save_results", record)
    return drawn


@pytest.mark.parametrize("flags", [(), ("--use_rslora",), ("--use_dora",), ("--use_rslora", "--use_dora")])
def test_diffusers_draws_with_the_file_what_the_live_model_draws(
    run: Run, live: list[np.ndarray], tiny_flux: Path, flags: tuple[str, ...]
) -> None:
    output = run(script, *(PLAIN if "--use_dora" in flags else TRAINED), *flags, "--max_train_steps=4")
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    before = draw(pipeline)
    pipeline.load_lora_weights(output, weight_name="pytorch_lora_weights.safetensors")
    after = draw(pipeline)
    assert np.abs(after - before).max() > 0.05
    assert np.abs(after - live[0]).max() < 1e-4


@pytest.mark.parametrize("flags", [("--use_rslora",), ("--use_dora",)])
def test_they_are_other_adapters(run: Run, live: list[np.ndarray], flags: tuple[str, ...], tmp_path: Path) -> None:
    run(script, *PLAIN)
    run(script, *PLAIN, *flags, f"--output_dir={tmp_path / 'other'}")
    assert np.abs(live[0] - live[1]).max() > 1e-3


def test_dora_resumes_exactly(run: Run, tmp_path: Path) -> None:
    flags = (*PLAIN, "--use_dora", "--max_train_steps=3", "--checkpointing_steps=2")
    whole = run(script, *flags)
    resumed = run(
        script, *flags, f"--output_dir={tmp_path / 'resumed'}", f"--resume_from_checkpoint={whole / 'checkpoint-2'}"
    )
    one, other = (load_file(output / script.LORA_FILE) for output in (whole, resumed))
    assert any("magnitude" in name for name in one) and all(torch.equal(one[name], other[name]) for name in one)


SCALED = ("--rank=4", "--lora_alpha=16", "--learning_rate=1e-2", "--train_text_encoder", "--text_encoder_lr=1e-2")


@pytest.mark.parametrize(("flags", "scale"), [((), 4.0), (("--use_rslora",), 8.0)])
def test_the_result_needs_no_metadata_and_a_checkpoint_keeps_what_is_trained(
    run: Run, flags: tuple[str, ...], scale: float
) -> None:
    """In the result the scale is in B, for programs that read no metadata; a checkpoint's B is the trained one."""
    output = run(script, *SCALED, *flags, "--checkpointing_steps=2", "--upcast_before_saving")
    result, trained = (load_file(folder / script.LORA_FILE) for folder in (output, output / "checkpoint-2"))
    assert result.keys() == trained.keys()
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, trained[name] * (scale if "lora_B" in name else 1.0))
    assert any(tensor.abs().max() > 0 for name, tensor in result.items() if "lora_B" in name)
    assert metadata(output)["transformer.lora_alpha"] == metadata(output)["transformer.r"] == 4
    assert metadata(output)["text_encoder.use_rslora"] is False
    assert metadata(output / "checkpoint-2")["transformer.lora_alpha"] == 16


def metadata(folder: Path) -> dict[str, Any]:
    with safe_open(folder / script.LORA_FILE, "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def test_the_metadata_has_no_field_that_another_version_of_peft_may_not_know(run: Run) -> None:
    known = {
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "use_dora", "lora_bias",
    }  # fmt: skip
    for folder in ((output := run(script, *SCALED, "--checkpointing_steps=2")), output / "checkpoint-2"):
        assert {name.split(".")[1] for name in metadata(folder)} == known


def test_clips_layers_are_called_as_transformers_4_and_other_programs_call_them(run: Run) -> None:
    names = [name for name in load_file(run(script, *SCALED) / script.LORA_FILE) if name.startswith("text_encoder.")]
    assert names and all(name.startswith("text_encoder.text_model.encoder.layers.") for name in names)


def test_a_checkpoint_whose_clip_layers_lack_the_prefix_resumes(run: Run, tmp_path: Path) -> None:
    """As those of earlier versions do."""
    flags = (*SCALED, "--max_train_steps=3", "--checkpointing_steps=2")
    whole = run(script, *flags)
    file = whole / "checkpoint-2" / script.LORA_FILE
    with safe_open(file, "pt") as opened:
        kept = opened.metadata()
    state = {name.replace(".text_model.", "."): value.clone() for name, value in load_file(file).items()}
    save_file(state, file, kept)
    seal(whole / "checkpoint-2")
    resumed = run(
        script, *flags, f"--output_dir={tmp_path / 'on'}", f"--resume_from_checkpoint={whole / 'checkpoint-2'}"
    )
    one, other = (load_file(folder / script.LORA_FILE) for folder in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def seal(checkpoint: Path) -> None:
    """Give a checkpoint that was edited the checksums that earlier versions wrote: CRC-32, as numbers."""
    path = checkpoint / "training_state.json"
    content = json.loads(path.read_text())
    content["files"] = {name: zlib.crc32((checkpoint / name).read_bytes()) for name in content["files"]}
    content["checksum"] = zlib.crc32(json.dumps([content["files"], content["facts"]]).encode())
    path.write_text(json.dumps(content))


def test_a_pipeline_that_was_saved_has_clips_names_of_transformers_4(run: Run) -> None:
    """Which takes others for missing weights, and goes on with random ones; transformers 5 reads both."""
    output = run(full_script, "--train_text_encoder", "--checkpointing_steps=2", "--upcast_before_saving")
    saved = load_file(output / "text_encoder" / "model.safetensors")
    trained = load_file(output / "checkpoint-2" / "text_encoder" / "model.safetensors")
    assert saved.keys() == {f"text_model.{name}" for name in trained}
    loaded = CLIPTextModel.from_pretrained(output / "text_encoder").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())


def test_the_single_file_is_the_transformer_in_bfloat16(run: Run) -> None:
    output = run(full_script, "--save_single_file", "--learning_rate=1e-2")
    expected = FluxTransformer2DModel.from_pretrained(output / "transformer", dtype=torch.bfloat16)
    got = FluxTransformer2DModel.from_single_file(
        output / "transformer_bf16.safetensors", config=str(output / "transformer"), dtype=torch.bfloat16
    )
    for (name, one), (_, other) in zip(got.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(one, other) and one.dtype == torch.bfloat16, name


def test_the_single_file_loads_beside_the_pipeline_that_was_saved(run: Run) -> None:
    """As README says it."""
    output = run(full_script, "--save_single_file")
    path = str(output / "transformer_bf16.safetensors")
    FluxTransformer2DModel.from_single_file(path, config=str(output), subfolder="transformer", dtype=torch.bfloat16)


def test_the_single_file_is_written_on_request_only(run: Run) -> None:
    assert not (run(full_script) / full_script.SINGLE_FILE).exists()
