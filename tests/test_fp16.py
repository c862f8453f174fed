"""fp16 with the gradient scaler. accelerate refuses fp16 without a GPU: its parts are put together here on the CPU."""

import argparse
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from conftest import Run


@pytest.fixture
def fp16(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> torch.amp.GradScaler:
    """Make the script's accelerator one that runs fp16 with the scaler that is returned."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    original = script.make_accelerator

    def make(args: argparse.Namespace) -> Accelerator:
        accelerator = original(args)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp, accelerator.scaler = True, scaler
        return accelerator

    monkeypatch.setattr(script, "make_accelerator", make)
    return scaler


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    steps: list[dict[str, float]] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, **__: steps.append(values))
    return steps


def weights(script: ModuleType, folder: Path) -> dict[str, torch.Tensor]:
    if "lora" in script.__name__:
        return load_file(folder / script.LORA_FILE)
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_fp16_trains(script: ModuleType, run: Run, fp16: torch.amp.GradScaler, logged: list[dict[str, float]]) -> None:
    """Gradients are clipped at their true size, and the loss is near that of a float32 run."""
    flags = ("--max_train_steps=6", "--learning_rate=1e-3", "--upcast_before_saving", "--mixed_precision=no")
    output = run(script, *flags, "--checkpointing_steps=1")
    half = [(step["loss"], step["grad_norm"]) for step in logged]
    first, last = (weights(script, output / f"checkpoint-{step}") for step in (1, 6))
    assert all(tensor.dtype == torch.float32 for tensor in last.values())
    assert sum(not torch.equal(first[name], last[name]) for name in last) > 0.9 * len(last)
    logged.clear()
    fp16.update(2.0**4)  # another scale, the same gradients
    run(script, *flags)
    other = [(step["loss"], step["grad_norm"]) for step in logged]
    assert other[0] == pytest.approx(half[0], rel=1e-2) and other[-1] == pytest.approx(half[-1], rel=5e-2)


def test_a_step_whose_gradients_overflow_is_skipped_and_training_goes_on(
    script: ModuleType, run: Run, fp16: torch.amp.GradScaler, logged: list[dict[str, float]]
) -> None:
    fp16._init_scale = 2.0**24
    output = run(script, "--max_train_steps=14", "--checkpointing_steps=1", "--mixed_precision=no")
    assert fp16.get_scale() < 2.0**24
    first, second, last = (weights(script, output / f"checkpoint-{step}") for step in (1, 2, 14))
    assert all(torch.equal(first[name], second[name]) for name in first), "an overflowing step moved the weights"
    assert any(not torch.equal(second[name], last[name]) for name in last)
    assert all(torch.isfinite(tensor).all() for tensor in last.values()) and len(logged) == 14


def test_without_a_gpu_fp16_is_refused_with_the_way_out(
    script: ModuleType, base_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        script.parse_args([*base_flags, "--mixed_precision=fp16"])
    assert stop.value.code == 2 and "--mixed_precision=fp16 needs a GPU; give bf16 or no" in capsys.readouterr().err
