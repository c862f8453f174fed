"""Optimizers are those of their libraries with the flags' settings: decays, clipping, rates; what is broken stops."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes
import prodigyopt
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.optimization import Adafactor

import train_dreambooth_flux as full
import train_dreambooth_lora_flux as lora
from conftest import Run, one_script
from tests.test_precision import spy

ADAM = {"betas": (0.8, 0.95), "eps": 1e-6}
PRODIGY = {"beta3": 0.9, "decouple": False, "use_bias_correction": True, "safeguard_warmup": True}
Group = tuple[Tensor, float, float]  # a weight, its rate and its decay
Gradients = list[list[Tensor]]  # by step and weight


def step_adamw(groups: list[Group], gradients: Gradients) -> None:
    """https://arxiv.org/abs/1711.05101, algorithm 2, in float64."""
    for number, (weight, rate, decay) in enumerate(groups):
        mean = square = torch.zeros_like(weight)
        for step, gradient in enumerate((part[number].double() for part in gradients), start=1):
            mean, square = 0.8 * mean + 0.2 * gradient, 0.95 * square + 0.05 * gradient**2
            weight -= rate * decay * weight
            weight -= rate * (mean / (1 - 0.8**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-6)


def step_by(make: Callable[..., torch.optim.Optimizer], **settings: Any) -> Callable[..., None]:
    def step(groups: list[Group], gradients: Gradients) -> None:
        given = [{"params": [weight], "lr": rate, "weight_decay": decay} for weight, rate, decay in groups]
        optimizer = make(given, **settings)
        for part in gradients:
            for (weight, _, _), gradient in zip(groups, part, strict=True):
                weight.grad = gradient
            optimizer.step()

    return step


REFERENCES = {  # and how exact they are
    "AdamW": (step_adamw, 1e-5),
    "adamw8bit": (step_by(bitsandbytes.optim.AdamW8bit, **ADAM), 0),
    "adafactor": (step_by(Adafactor, scale_parameter=False, relative_step=False), 0),
    "prodigy": (step_by(prodigyopt.Prodigy, **ADAM, **PRODIGY), 0),
    "sgd": (step_by(torch.optim.SGD, momentum=0.9), 0),  # as somebody adds it
}


@pytest.fixture
def steps(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Fills with the weights and gradients that the optimizers find at each step."""
    found, make_optimizer = list[tuple[list[Tensor], list[Tensor]]](), script.make_optimizer

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        found.append(([weight.detach().clone() for weight in weights], [weight.grad.clone() for weight in weights]))

    def make(*given: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = make_optimizer(*given)
        optimizer.register_step_pre_hook(keep)
        return optimizer

    monkeypatch.setattr(script, "make_optimizer", make)
    return found


@pytest.mark.parametrize("script", [full], ids=["full"])
@pytest.mark.parametrize("name", REFERENCES)
def test_an_optimizer_takes_the_steps_of_its_library_or_paper_with_each_models_rate_and_decay(
    script: ModuleType, name: str, run: Run, monkeypatch: pytest.MonkeyPatch, steps: list[tuple[Any, Any]]
) -> None:
    end: list[Any] = []
    monkeypatch.setitem(script.OPTIMIZERS, "sgd", ("torch.optim.SGD", lambda _: {"momentum": 0.9}))
    spy(monkeypatch, script, "save_result", end.append)
    rates = (1.0, 1.0) if name == "prodigy" else (0.01, 0.02)
    flags = ["--adam_beta1=0.8", "--adam_beta2=0.95", "--adam_epsilon=1e-6", "--prodigy_beta3=0.9"]
    flags += ["--prodigy_decouple=false", "--adam_weight_decay=0.1", "--adam_weight_decay_text_encoder=0.3"]
    flags += [f"--learning_rate={rates[0]}", f"--text_encoder_lr={rates[1]}", f"--optimizer={name}"]
    run(script, *flags, "--train_text_encoder", "--max_train_steps=3")
    step, error = REFERENCES[name]
    weights = [weight.double() if error else weight for weight in steps[0][0]]
    transformer, clip = (len(list(model.parameters())) for model in end[0].models)
    settings = [(rates[0], 0.1)] * transformer + [(rates[1], 0.3)] * clip
    groups = [(weight, *setting) for weight, setting in zip(weights, settings, strict=True)]
    step(groups, [gradients for _, gradients in steps])
    assert len(steps) == 3
    for got, wanted in zip(end[0].parameters, weights, strict=True):
        torch.testing.assert_close(got.detach().to(wanted.dtype), wanted, rtol=error, atol=error)


def test_gradients_are_clipped_to_the_norm_that_was_asked_for_all_weights_together(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, steps: list[tuple[Any, Any]]
) -> None:
    norms: list[float] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, **__: norms.append(values["grad_norm"]))
    flags = ["--train_text_encoder", "--max_train_steps=1", "--gradient_accumulation_steps=2"]
    for limit in (0, 0.01, 1e6):
        run(script, *flags, f"--max_grad_norm={limit}")
    off, below, above = (torch.cat([gradient.flatten() for gradient in gradients]) for _, gradients in steps)
    assert norms == pytest.approx([off.double().norm().item()] * 3, rel=1e-5)  # logged as it is before clipping
    torch.testing.assert_close(below, off * (0.01 / norms[0]), rtol=1e-4, atol=1e-9)
    assert torch.equal(above, off)


def test_each_micro_batch_draws_another_dropout_of_the_adapters(run: Run) -> None:
    """Two epochs of five pictures, so that a place of an epoch comes twice."""
    masks: list[bytes] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if isinstance(module, nn.Dropout) and module.p == 0.5 and inputs[0].shape[1] == 4:
            masks.append((output == 0).numpy().tobytes())

    hook = nn.modules.module.register_module_forward_hook(keep)
    run(lora, "--lora_dropout=0.5", "--max_train_steps=10")
    hook.remove()
    assert len(set(masks[:: len(masks) // 10])) == 10, "the first layer's masks"


@one_script
@pytest.mark.parametrize(
    ("flags", "factors"),
    [
        (["--lr_scheduler=linear", "--lr_warmup_steps=2"], [0.5, 1, 0.75, 0.5, 0.25, 0]),
        (["--lr_scheduler=polynomial", "--lr_warmup_steps=0", "--lr_power=2"], [(1 - n / 6) ** 2 for n in range(1, 7)]),
        (["--scale_lr", "--train_batch_size=2"], [4] * 6),
    ],
    ids=["linear", "polynomial", "scaled"],
)
def test_the_rate_follows_its_schedule_by_optimizer_steps(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, flags: list[str], factors: list[float]
) -> None:
    """Logged after the step: the rate of the next one."""
    rates: list[float] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, **__: rates.append(values["lr"]))
    run(script, *flags, "--max_train_steps=6", "--gradient_accumulation_steps=2", "--learning_rate=1e-3")
    assert rates == pytest.approx([1e-3 * factor for factor in factors], abs=2e-7)


# The slope of a square root at zero is infinite, and times zero no number; the loss itself stays as it is.
BROKEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nan": lambda loss, _: loss * math.nan,
    "inf": lambda loss, _: loss + math.inf,
    "gradient": lambda loss, weight: loss + (0 * weight.sum()).sqrt(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_number_stops_the_run_by_its_step_before_a_checkpoint_holds_it(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, kind: str, tmp_path: Path
) -> None:
    training_loss, calls = script.training_loss, iter(range(1, 9))

    def spoil(transformer: nn.Module, inputs: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = training_loss(transformer, inputs)
        weight = next(value for value in transformer.parameters() if value.requires_grad)
        return {"loss": BROKEN[kind](losses["loss"], weight)} if next(calls) == 3 else losses

    monkeypatch.setattr(script, "training_loss", spoil)
    with pytest.raises(SystemExit, match=rf"{'norm nan' if kind == 'gradient' else kind + ' at step 3'}\b"):
        run(script, "--max_train_steps=5", "--checkpointing_steps=1")
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
