"""--use_ema: the average of the weights, which validation and the result use, and which a resume continues exactly."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from conftest import SCRIPTS, Run, both_scripts, one_script
from tests.test_checkpoints import WEIGHTS

pytestmark = one_script

FLAGS = ("--learning_rate=1e-2", "--max_train_steps=5", "--train_batch_size=2")


@pytest.fixture
def steps(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The live weights before the first step and after each."""
    seen: list[list[Tensor]] = []
    log_step, train = script.log_step, script.train

    def keep(run: Any) -> None:
        seen.append([parameter.detach().clone() for parameter in run.trained.parameters])

    monkeypatch.setattr(script, "train", lambda run, *args: (keep(run), train(run, *args)))
    monkeypatch.setattr(script, "log_step", lambda run, *args: (keep(run), log_step(run, *args))[1])
    return seen


@pytest.fixture
def result(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that are saved as the result."""
    seen: list[Tensor] = []
    save = script.save_results

    def keep(args: Any, accelerator: Any, trained: Any, dtype: Any) -> None:
        seen[:] = [parameter.detach().clone() for parameter in trained.parameters]
        save(args, accelerator, trained, dtype)

    monkeypatch.setattr(script, "save_results", keep)
    return seen


def average(steps: list[list[Tensor]], decay: float) -> list[Tensor]:
    """The exponential moving average of the steps, with a decay that is 0 first and then grows as (1 + n)/(10 + n)."""
    mean = [weight.double() for weight in steps[0]]
    for number, weights in enumerate(steps[1:]):
        kept = 0 if number == 0 else min(decay, (1 + number) / (10 + number))
        mean = [kept * old + (1 - kept) * new.double() for old, new in zip(mean, weights, strict=True)]
    return mean


@pytest.mark.parametrize("decay", [0.99, 0.2])
@both_scripts
def test_the_result_is_the_moving_average_of_the_steps(
    script: ModuleType, run: Run, steps: list[list[Tensor]], result: list[Tensor], decay: float
) -> None:
    run(script, *FLAGS, "--use_ema", f"--ema_decay={decay}", "--train_text_encoder")
    assert len(steps) == 6
    for got, wanted in zip(result, average(steps, decay), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    assert any((got - live).abs().max() > 1e-3 for got, live in zip(result, steps[-1], strict=True))


def test_the_training_and_its_checkpoints_are_those_without_it(
    script: ModuleType, run: Run, tmp_path: Path, steps: list[list[Tensor]]
) -> None:
    validated = ["--validation_loss", "--validation_epochs=1", "--validation_prompt=a dog", "--checkpointing_steps=5"]
    validated += ["--validation_num_inference_steps=1"]
    plain = run(script, *FLAGS, *validated)
    expected, steps[:] = list(steps), []
    averaged = run(script, *FLAGS, *validated, "--use_ema", f"--output_dir={tmp_path / 'ema'}")
    for one, other in zip(expected, steps, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    one, other = (load_file(output / "checkpoint-5" / WEIGHTS[script.__name__]) for output in (plain, averaged))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_validation_sees_the_average_and_leaves_the_live_weights(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, steps: list[list[Tensor]]
) -> None:
    seen: list[list[Tensor]] = []
    monkeypatch.setattr(
        script, "draw_validation_pictures",
        lambda run: seen.append([parameter.detach().clone() for parameter in run.trained.parameters]),
    )  # fmt: skip
    flags = ["--validation_prompt=a dog", "--validation_steps=5", "--skip_final_inference", "--train_batch_size=1"]
    run(script, *FLAGS, *flags, "--max_train_steps=6", "--use_ema")
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(seen[0], steps[0], strict=True))
    for got, wanted in zip(seen[1], average(steps[:6], 0.99), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


@both_scripts
def test_a_resumed_run_ends_with_the_average_of_the_run_never_stopped(
    script: ModuleType, run: Run, tmp_path: Path, result: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = run(script, *FLAGS, "--use_ema", "--checkpointing_steps=2")
    whole = list(result)

    def resume(name: str, *flags: str) -> list[bool]:
        result.clear()
        flags += (f"--output_dir={tmp_path / name}", f"--resume_from_checkpoint={checkpoints / 'checkpoint-2'}")
        run(script, *FLAGS, "--use_ema", *flags)
        return [torch.equal(one, other) for one, other in zip(result, whole, strict=True)]

    assert all(resume("same"))
    assert not any(resume("other", "--ema_decay=0.1"))
    assert "ema_decay was 0.99 and is 0.1" in caplog.text


def test_a_checkpoint_without_an_average_does_not_fit_a_run_with_one(script: ModuleType, run: Run) -> None:
    run(script, *FLAGS, "--checkpointing_steps=2")
    with pytest.raises(script.UsageError, match="--use_ema was False and is True"):
        run(script, *FLAGS, "--use_ema", "--resume_from_checkpoint=latest")


def test_sharded_weights_are_refused_before_anything_is_loaded(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", "FSDP")
    monkeypatch.setattr(script, "check_everything", lambda *_: pytest.fail("the run began"))
    with pytest.raises(script.UsageError, match="--use_ema: not with FSDP2"):
        run(script, "--use_ema")


@pytest.mark.parametrize("script", [SCRIPTS["full"]], ids=["full"])
def test_the_average_of_bfloat16_weights_is_float32(script: ModuleType, run: Run, result: list[Tensor]) -> None:
    output = run(script, *FLAGS, "--use_ema", "--full_bf16", "--mixed_precision=bf16", "--checkpointing_steps=5")
    state = torch.load(output / "checkpoint-5" / "custom_checkpoint_0.pkl", weights_only=True)
    assert {shadow.dtype for shadow in state["shadow_params"]} == {torch.float32}
    for shadow, weight in zip(state["shadow_params"], result, strict=True):
        assert torch.equal(shadow.bfloat16(), weight)
