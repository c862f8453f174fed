"""--init_lora: a LoRA of any scale becomes the starting weights, of adapters or of the whole model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

import train_dreambooth_flux as full
import train_dreambooth_lora_flux as lora
from conftest import Run
from tools.lora_to_kohya import main

FLAGS = ["--validation_loss", "--validation_steps=3", "--max_train_steps=3", "--upcast_before_saving", "--rank=2"]
CLIP = ["--train_text_encoder", "--text_encoder_lr=1e-2", "--learning_rate=1e-2"]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    logged: list[float] = []
    names = ("validation_loss",)
    monkeypatch.setattr(
        Accelerator, "log", lambda _, values, step: logged.extend(values[name] for name in names if name in values)
    )
    return logged


@pytest.mark.parametrize("alpha", ["--lora_alpha=2", "--lora_alpha=7", "--use_rslora"])
def test_the_first_validation_loss_is_the_last_of_the_run_that_wrote_the_file(
    run: Run, losses: list[float], alpha: str, tmp_path: Path
) -> None:
    written = run(lora, *FLAGS, *CLIP, "--lora_alpha=3")
    flags = [f"--init_lora={written}", f"--output_dir={tmp_path / 'next'}"]
    run(lora, *FLAGS, *CLIP, alpha, *flags)
    assert losses[2] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 1.001 * losses[1]


def test_the_full_script_starts_from_the_merged_weights(run: Run, losses: list[float], tmp_path: Path) -> None:
    written = run(lora, *FLAGS, *CLIP, "--lora_alpha=3")
    flags = [flag for flag in FLAGS if not flag.startswith("--rank")]
    run(full, *flags, *CLIP, f"--init_lora={written / lora.LORA_FILE}", f"--output_dir={tmp_path / 'next'}")
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("pattern", ["transformer_blocks.0.attn.to_q", r"^transformer_blocks\.0\..*to_q"])
def test_a_scale_that_stands_in_the_metadata_counts(
    run: Run, losses: list[float], tmp_path: Path, pattern: str
) -> None:
    """As other trainers write them: alpha beside the weights, and not in them."""
    written = run(lora, *FLAGS, "--learning_rate=1e-2") / lora.LORA_FILE
    with safe_open(written, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        state: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["transformer.lora_alpha"] = 5  # of rank 2: the weights are multiplied by 2.5
    metadata["transformer.alpha_pattern"] = {pattern: 2}  # not single_transformer_blocks.0's
    other_alpha = "transformer.transformer_blocks.0.attn.to_q."
    state = {
        name: value / 2.5 if "lora_B" in name and not name.startswith(other_alpha) else value
        for name, value in state.items()
    }
    other = tmp_path / "other.safetensors"
    save_file(state, other, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    run(lora, *FLAGS, f"--init_lora={other}", f"--output_dir={tmp_path / 'next'}")
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)


def test_kohyas_names_start_what_ours_do(run: Run, losses: list[float], tmp_path: Path) -> None:
    layers = "--lora_layers=ff.net.0.proj"  # diffusers knows those of the single blocks at FLUX.1's own size only
    written = run(lora, *FLAGS, *CLIP, layers) / lora.LORA_FILE
    main([str(written), str(tmp_path / "kohya.safetensors")])
    flags = [layers, f"--init_lora={tmp_path / 'kohya.safetensors'}", f"--output_dir={tmp_path / 'next'}"]
    run(lora, *FLAGS, *CLIP, *flags)
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)


def test_what_does_not_fit_is_one_message(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = run(lora, *FLAGS, *CLIP)
    with safe_open(written / lora.LORA_FILE, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    rows = torch.zeros(2, 64)
    save_file(
        state | {"x_embedder.lora_A.weight": rows, "x_embedder.lora_B.weight": rows.T.contiguous()},
        tmp_path / "x.safetensors",
    )
    monkeypatch.setattr(lora, "encode_prompts", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(lora.UsageError, match=r"no adapter of this script takes: x_embedder\.lora_A\.weight"):
        run(lora, "--rank=2", "--train_text_encoder", f"--init_lora={tmp_path / 'x.safetensors'}")
    for flags, words in (
        (["--rank=3", "--train_text_encoder"], r"of rank \[2\], and --rank is 3"),
        (["--rank=2"], "give --train_text_encoder"),
        (
            ["--rank=2", "--train_text_encoder", "--lora_layers=attn.to_q"],
            "other adapters than this run",
        ),
    ):
        with pytest.raises(lora.UsageError, match=words):
            run(lora, *flags, f"--init_lora={written}", f"--output_dir={tmp_path / 'next'}")
    with pytest.raises(full.UsageError, match=r"--init_lora is .*which does not load"):
        run(full, f"--init_lora={tmp_path}", f"--output_dir={tmp_path / 'full'}")


def test_dora_and_other_alphas_are_merged_and_what_cannot_be_is_refused(
    run: Run, losses: list[float], tmp_path: Path
) -> None:
    written = run(lora, *FLAGS, "--use_dora", "--learning_rate=1e-2", "--lora_alpha=5") / lora.LORA_FILE
    flags = [flag for flag in FLAGS if not flag.startswith("--rank")]
    run(full, *flags, f"--init_lora={written}", f"--output_dir={tmp_path / 'merged'}")
    assert losses[2] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 1.001 * losses[1]
    with safe_open(written, "pt") as file:
        state = {f"diffusion_model.{name}": file.get_tensor(name) for name in file.keys() if "lora_A" in name}  # noqa: SIM118
    save_file(state, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(full.UsageError, match=r"diffusion_model\..* is of nothing that is trained"):
        run(full, f"--init_lora={tmp_path / 'other.safetensors'}", f"--output_dir={tmp_path / 'other'}")


@pytest.mark.parametrize("script", [lora, full])
def test_magnitudes_that_diffusers_drops_are_not_dropped_in_silence(
    run: Run, script: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DoRA in kohya's names: diffusers loads the rest."""
    layer = "lora_unet_double_blocks_0_img_mlp_0"
    with safe_open(run(lora, "--rank=2") / lora.LORA_FILE, "pt") as file:
        name = "transformer.transformer_blocks.0.ff.net.0.proj.lora_"
        down, up = (file.get_tensor(f"{name}{side}.weight") for side in "AB")
    state = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.tensor(2.0)}
    save_file(state | {f"{layer}.dora_scale": torch.ones(len(up), 1)}, tmp_path / "dora.safetensors", {"format": "pt"})
    caplog.clear()
    flags = ["--rank=2", "--lora_layers=transformer_blocks.0.ff.net.0.proj"] if script is lora else []
    run(script, *flags, f"--init_lora={tmp_path / 'dora.safetensors'}", f"--output_dir={tmp_path / 'next'}")
    assert "dora_scale" in caplog.text


def test_a_resumed_run_takes_its_checkpoint_and_not_the_lora(run: Run, tmp_path: Path) -> None:
    written = run(lora, "--rank=2")
    flags = ["--rank=2", f"--init_lora={written}", "--checkpointing_steps=1", f"--output_dir={tmp_path / 'next'}"]
    whole = run(lora, *flags, "--max_train_steps=3")
    expected = torch.load(whole / "checkpoint-3" / "optimizer.bin")["state"]
    resumed = run(lora, *flags[:3], "--max_train_steps=3", f"--output_dir={tmp_path / 'other'}",
                  f"--resume_from_checkpoint={whole / 'checkpoint-2'}")  # fmt: skip
    got = torch.load(resumed / "checkpoint-3" / "optimizer.bin")["state"]
    assert all(torch.equal(got[key]["exp_avg"], expected[key]["exp_avg"]) for key in expected)
