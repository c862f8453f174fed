"""What the optimizer is told: weight decays, the clipping of gradients, and the dropout that it trains under."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

import train_dreambooth_lora_flux as lora
from conftest import Run


def saved(output: Path) -> dict[str, dict[str, Tensor]]:
    """What was trained of each model, LoRA or whole weights, in float64; the models are the folders' names."""
    files = [*output.glob("*.safetensors"), *output.glob("transformer/*.safetensors")]
    files += output.glob("text_encoder/*.safetensors")
    found: dict[str, dict[str, Tensor]] = {"transformer": {}, "text_encoder": {}}
    for file in files:
        for name, value in load_file(file).items():
            lone = file.parent == output  # a LoRA file, where each name starts with that of the model
            found[name.split(".")[0] if lone else file.parent.name][name] = value.double()
    return found


def test_each_model_decays_by_its_own_weight_decay(script: ModuleType, run: Run, tmp_path: Path) -> None:
    """AdamW takes rate times decay times weight away, whatever the gradient."""
    rates, decays = {"transformer": 0.02, "text_encoder": 0.03}, {"transformer": 0.5, "text_encoder": 0.25}

    def train(name: str, flags: list[str]) -> dict[str, dict[str, Tensor]]:
        common = ["--train_text_encoder", "--max_train_steps=1", f"--output_dir={tmp_path / name}"]
        return saved(run(script, *common, *flags))

    none = ["--adam_weight_decay=0", "--adam_weight_decay_text_encoder=0"]
    some = [f"--adam_weight_decay={decays['transformer']}"]
    some += [f"--adam_weight_decay_text_encoder={decays['text_encoder']}"]
    given = [f"--learning_rate={rates['transformer']}", f"--text_encoder_lr={rates['text_encoder']}"]
    start = train("start", ["--learning_rate=0", "--text_encoder_lr=0", *none])
    plain, decayed = train("plain", [*given, *none]), train("decayed", [*given, *some])
    for model, weights in start.items():
        assert weights
        for name, weight in weights.items():
            lost = plain[model][name] - decayed[model][name]
            torch.testing.assert_close(lost, rates[model] * decays[model] * weight, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_are_clipped_to_the_norm_that_was_asked_for_all_weights_together(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batches: int
) -> None:
    """With an epsilon far above the gradients, AdamW's first update is the gradient times rate over epsilon."""
    norms: list[float] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, **__: norms.append(values["grad_norm"]))
    flags = ["--train_text_encoder", "--max_train_steps=1", "--adam_epsilon=1e4", "--adam_weight_decay=0"]
    flags += ["--adam_weight_decay_text_encoder=0", f"--gradient_accumulation_steps={micro_batches}"]

    def train(name: str, rate: float, limit: float) -> Tensor:
        given = [f"--learning_rate={rate}", f"--text_encoder_lr={rate}", f"--max_grad_norm={limit}"]
        weights = saved(run(script, *flags, *given, f"--output_dir={tmp_path / name}"))
        return torch.cat([value.flatten() for model in weights.values() for value in model.values()])

    start = train("start", 0, 0)
    limits = {"off": 0, "below": 0.01, "above": 1e6}
    updates = {name: (train(name, 1e5, limit) - start) / 10 for name, limit in limits.items()}
    assert len(set(norms)) == 1 and norms[0] > 1, "the norm that is logged is that before the clipping"
    for name, limit in limits.items():
        wanted = min(norms[0], limit or norms[0])
        assert updates[name].norm().item() == pytest.approx(wanted, rel=1e-2), name
    assert torch.cosine_similarity(updates["below"], updates["off"], dim=0) > 0.999


def test_each_micro_batch_draws_another_dropout_of_the_adapters_and_repeats_it_when_run_again(
    run: Run, tmp_path: Path
) -> None:
    """Two epochs of five pictures, so that a place of an epoch comes twice."""

    def masks(name: str, seed: int) -> list[bytes]:
        found: list[bytes] = []

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if isinstance(module, nn.Dropout) and module.p == 0.5 and module.training and inputs[0].shape[1] == 4:
                found.append((output == 0).numpy().tobytes())

        hook = nn.modules.module.register_module_forward_hook(keep)
        run(lora, "--lora_dropout=0.5", "--max_train_steps=10", f"--seed={seed}", f"--output_dir={tmp_path / name}")
        hook.remove()
        return found

    one, again, other = masks("one", 0), masks("again", 0), masks("other", 1)
    layers = len(one) // 10
    assert len(one) == 10 * layers > 0
    assert len(set(one[::layers])) == 10, "the first layer's masks"
    assert one == again
    assert not set(one[::layers]) & set(other[::layers])


@pytest.mark.parametrize(
    ("flags", "factors"),
    [
        (["--lr_scheduler=linear", "--lr_warmup_steps=2"], [0.5, 1, 0.75, 0.5, 0.25, 0]),
        (["--lr_scheduler=polynomial", "--lr_warmup_steps=0", "--lr_power=2"], [(1 - n / 6) ** 2 for n in range(1, 7)]),
        (["--lr_scheduler=polynomial", "--lr_warmup_steps=6"], [n / 6 for n in range(1, 7)]),
        (["--scale_lr", "--train_batch_size=2"], [4] * 6),
    ],
    ids=["linear", "polynomial", "a warm-up of all steps", "scaled"],
)
def test_the_rate_follows_its_schedule_by_optimizer_steps(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, flags: list[str], factors: list[float]
) -> None:
    """Logged after the step: the rate of the next one."""
    rates: list[float] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, **__: rates.append(values["lr"]))
    run(script, *flags, "--max_train_steps=6", "--gradient_accumulation_steps=2", "--learning_rate=1e-3")
    assert rates == pytest.approx([1e-3 * factor for factor in factors], abs=2e-7)


def test_a_warm_up_that_never_ends_is_said(script: ModuleType, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run(script, "--lr_scheduler=cosine")
    assert "--lr_warmup_steps=500 is not below the 2 steps: the learning rate only rises" in caplog.text
