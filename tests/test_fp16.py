"""fp16 with the gradient scaler, on the CPU, where accelerate alone would leave out both autocast and scaler."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from conftest import Run


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> torch.amp.GradScaler:
    """The scaler of the next run, in place of the script's own, to be looked at and set."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler)
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
    flags = ("--max_train_steps=6", "--learning_rate=1e-3", "--upcast_before_saving", "--mixed_precision=fp16")
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
    output = run(script, "--max_train_steps=14", "--checkpointing_steps=1", "--mixed_precision=fp16")
    assert fp16.get_scale() < 2.0**24
    first, second, last = (weights(script, output / f"checkpoint-{step}") for step in (1, 2, 14))
    assert all(torch.equal(first[name], second[name]) for name in first), "an overflowing step moved the weights"
    assert any(not torch.equal(second[name], last[name]) for name in last)
    assert all(torch.isfinite(tensor).all() for tensor in last.values()) and len(logged) == 14


def test_fp16_works_without_a_gpu_as_in_the_scripts_that_people_come_from(
    script: ModuleType, run: Run, logged: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast: the transformer's products are float16, what is trained stays float32."""
    dtypes, linear = set(), torch.nn.functional.linear

    def record(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        y = linear(x, *rest)
        dtypes.add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    output = run(script, "--mixed_precision=fp16", "--max_train_steps=2", "--upcast_before_saving")
    assert torch.float16 in dtypes and len(logged) == 2
    assert all(tensor.dtype == torch.float32 for tensor in weights(script, output).values())


def test_a_run_in_float32_goes_on_in_fp16(script: ModuleType, run: Run, logged: list[dict[str, float]]) -> None:
    """Its checkpoint has no state of a scaler."""
    run(script, "--max_train_steps=1", "--checkpointing_steps=1")
    flags = ("--mixed_precision=fp16", "--max_train_steps=2", "--resume_from_checkpoint=latest")
    output = run(script, *flags, "--checkpointing_steps=1")
    assert len(logged) == 2 and (output / "checkpoint-2" / "scaler.pt").is_file()


def test_gradients_that_are_never_finite_end_the_run(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler skips such steps; a run of nothing else would end well, with the weights that it began with."""
    loss = script.training_loss
    monkeypatch.setattr(script, "training_loss", lambda *given: Broken.apply(loss(*given)))
    with pytest.raises(script.RunError, match=r"at step 3\d, its gradient's norm nan"):
        run(script, "--mixed_precision=fp16", "--max_train_steps=60")


class Broken(torch.autograd.Function):
    """A loss that is a number, with a gradient that is none."""

    @staticmethod
    def forward(_: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * torch.nan
