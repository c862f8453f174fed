"""--init_lora: a LoRA of any scale becomes the starting weights, of adapters or of the whole model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_dreambooth_flux as full
import train_dreambooth_lora_flux as lora
from conftest import Run
from tools.lora_to_kohya import main

FLAGS = ["--validation_loss", "--validation_steps=3", "--max_train_steps=3", "--upcast_before_saving"]
CLIP = ["--train_text_encoder", "--text_encoder_lr=1e-2", "--learning_rate=1e-2"]
RANK = ["--rank=2", "--lora_alpha=3"]


def read(path: Path) -> tuple[dict[str, Any], dict]:
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def validation_losses(logged: list[dict[str, float]]) -> list[float]:
    return [values["validation_loss"] for values in logged if "validation_loss" in values]


@pytest.mark.parametrize("script", [lora, full], ids=["lora", "full"])
def test_the_first_validation_loss_is_the_last_of_the_run_that_wrote_the_file(
    script: Any, run: Run, logged: list[dict[str, float]], tmp_path: Path
) -> None:
    """The file's rank and alpha count, whatever the flags say; the full script merges it."""
    written = run(lora, *FLAGS, *CLIP, *RANK)
    path = written if script is lora else written / lora.LORA_FILE
    flags = ["--rank=5", "--lora_alpha=7"] if script is lora else []
    output = run(script, *FLAGS, *CLIP, *flags, f"--init_lora={path}", f"--output_dir={tmp_path / 'next'}")
    losses = validation_losses(logged)
    assert losses[2] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 1.001 * losses[1]
    if script is lora:
        state, metadata = read(output / lora.LORA_FILE)
        assert {value.shape[0] for name, value in state.items() if "lora_A" in name} == {2}
        assert metadata["transformer.r"] == metadata["text_encoder.lora_alpha"] == 2


def test_a_scale_that_stands_in_the_metadata_counts(run: Run, logged: list[dict[str, float]], tmp_path: Path) -> None:
    """As other trainers write them: alpha beside the weights, and not in them."""
    state, metadata = read(run(lora, *FLAGS, *RANK, "--learning_rate=1e-2") / lora.LORA_FILE)
    metadata["transformer.lora_alpha"] = 5  # of rank 2: the weights are multiplied by 2.5
    metadata["transformer.alpha_pattern"] = {r"^transformer_blocks\.0\..*to_q": 2}  # not single_transformer_blocks.0's
    for name in state:
        if "lora_B" in name and not name.startswith("transformer.transformer_blocks.0.attn.to_q."):
            state[name] = state[name] / 2.5
    other = tmp_path / "other.safetensors"
    save_file(state, other, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    flags = [f"--init_lora={other}", f"--output_dir={tmp_path / 'next'}"]
    output = run(lora, *FLAGS, *flags, "--checkpointing_steps=1", "--learning_rate=0")
    losses = validation_losses(logged)
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    held = load_file(output / "checkpoint-1" / lora.LORA_FILE)
    assert [name for name in state if not torch.equal(held[name], state[name])] == []


def test_kohyas_names_start_what_ours_do(run: Run, logged: list[dict[str, float]], tmp_path: Path) -> None:
    layers = "--lora_layers=ff.net.0.proj"  # diffusers knows those of the single blocks at FLUX.1's own size only
    main([str(run(lora, *FLAGS, *CLIP, layers, *RANK) / lora.LORA_FILE), str(tmp_path / "kohya.safetensors")])
    flags = [f"--init_lora={tmp_path / 'kohya.safetensors'}", f"--output_dir={tmp_path / 'next'}"]
    output = run(lora, *FLAGS, *CLIP, *flags)
    losses = validation_losses(logged)
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert all("ff.net.0.proj" in name for name in load_file(output / lora.LORA_FILE) if "transformer" in name)


@pytest.mark.parametrize("more", [[], ["--base_quantization=int8", "--blocks_to_swap=1", "--gradient_checkpointing"]])
def test_a_run_in_bf16_holds_the_float32_weights_of_the_file_bit_for_bit(
    run: Run, tmp_path: Path, more: list[str]
) -> None:
    written = load_file(run(lora, *CLIP, "--upcast_before_saving") / lora.LORA_FILE)
    flags = [f"--init_lora={tmp_path / 'out'}", f"--output_dir={tmp_path / 'next'}", "--mixed_precision=bf16"]
    rates = ["--train_text_encoder", "--learning_rate=0", "--text_encoder_lr=0"]
    again = load_file(run(lora, *flags, *rates, *more, "--upcast_before_saving") / lora.LORA_FILE)
    assert again.keys() == written.keys() and all(torch.equal(again[name], written[name]) for name in written)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in written.values())


def test_what_does_not_fit_is_one_message_before_a_model_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = run(lora, *CLIP)
    state = load_file(written / lora.LORA_FILE)
    other = {f"unet.{name}": value for name, value in state.items() if name.startswith("transformer")}
    save_file(other, tmp_path / "other.safetensors")
    for script in (lora, full):
        monkeypatch.setattr(script, "encode_prompts", lambda *_: pytest.fail("a model was loaded"))
        for flags, path in (
            ([], written),
            (["--train_text_encoder"], tmp_path / "missing"),
            ([], tmp_path / "other.safetensors"),
        ):
            with pytest.raises(script.UsageError, match="--init_lora"):
                run(script, *flags, f"--init_lora={path}", f"--output_dir={tmp_path / 'next'}")


def test_a_resumed_run_takes_its_checkpoint_and_not_the_lora(run: Run, tmp_path: Path) -> None:
    written = run(lora, *RANK, "--learning_rate=1e-2")
    flags = ["--rank=2", f"--init_lora={written}", "--checkpointing_steps=1", f"--output_dir={tmp_path / 'next'}"]
    whole = load_file(run(lora, *flags, "--max_train_steps=3") / lora.LORA_FILE)
    resumed = run(lora, *flags, "--max_train_steps=3", "--resume_from_checkpoint=checkpoint-2")
    got = load_file(resumed / lora.LORA_FILE)
    assert all(torch.equal(got[name], whole[name]) for name in whole)
