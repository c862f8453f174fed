"""Precision follows what accelerate resolved: what is held and computed in it, in bf16 and, with a scaler, in fp16."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import train_dreambooth_lora_flux as lora
from conftest import SCRIPTS, Run, one_script
from tests.test_checkpoints import WEIGHTS

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def set_up_fp16(script: ModuleType, patch: pytest.MonkeyPatch, scale: float = 2.0**8) -> torch.amp.GradScaler:
    """The scaler of the runs in fp16 that follow; accelerate leaves it, and autocast, out on a CPU."""
    scaler, make = torch.amp.GradScaler("cpu", init_scale=scale), script.make_accelerator

    def make_accelerator(args: Any) -> Accelerator:
        accelerator = make(args)
        if accelerator.mixed_precision == "fp16":
            accelerator.native_amp, accelerator.scaler = True, scaler
        return accelerator

    patch.setattr(script, "make_accelerator", make_accelerator)
    return scaler


def spy(patch: pytest.MonkeyPatch, owner: Any, name: str, look: Callable[..., Any]) -> None:
    """Have `look` called with the arguments of each call of a script's or class's function, before it runs."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        look(*args, **kwargs)
        return function(*args, **kwargs)

    patch.setattr(owner, name, call)


def all_parameters(run: Any) -> dict[str, nn.Parameter]:
    return {f"{number}.{name}": value for number in (0, 1) for name, value in run.models[number].named_parameters()}


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    values: list[dict[str, float]] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, entry, **__: values.append(entry))
    return values


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16", "bf16 of the configuration"])
def test_what_is_trained_is_float32_and_what_is_frozen_has_the_precision_of_the_run(
    script: ModuleType, run: Run, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    name, _, configured = precision.partition(" ")
    set_up_fp16(script, monkeypatch)
    spy(monkeypatch, script, "save_result", found.append)
    if configured:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", name)
    run(script, "--train_text_encoder", *[f"--mixed_precision={name}"] * (not configured))
    [trained] = found
    states = [value for state in trained.optimizer.state.values() for value in state.values() if value.ndim > 0]
    assert {parameter.dtype for parameter in trained.parameters} == {torch.float32}
    assert {state.dtype for state in states} == {torch.float32} and len(states) == 2 * len(trained.parameters)
    parameters = all_parameters(trained)
    frozen = {name: value for name, value in parameters.items() if not value.requires_grad}
    assert len(trained.parameters) == len(parameters) - len(frozen)
    assert {value.dtype for value in frozen.values()} == ({DTYPES[name]} if script is lora else set())
    assert script is not lora or all("lora" in name for name in parameters.keys() - frozen.keys())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_only_weights_in_float32_run_under_autocast(
    script: ModuleType, run: Run, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a LoRA the two products of each adapter, and nothing of the base; of the full script all."""
    given, computed, linear = set[torch.dtype](), set[Any](), nn.functional.linear

    def record(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        y = linear(x, weight, *rest)
        computed.add((weight.dtype, torch.is_autocast_enabled("cpu"), y.dtype))
        return y

    def look(transformer: nn.Module, inputs: Any) -> None:
        given.update(getattr(inputs, name).dtype for name in ("latents", "noise", "sigmas", "loss_weights"))
        monkeypatch.setattr(nn.functional, "linear", record)

    set_up_fp16(script, monkeypatch)
    spy(monkeypatch, script, "training_loss", look)
    run(script, f"--mixed_precision={precision}", "--max_train_steps=1")
    half = DTYPES[precision]
    assert given == {torch.float32}
    assert computed == {(torch.float32, True, half)} | ({(half, False, half)} if script is lora else set())


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("case", ["full", "lora", "lora --base_quantization=int8", "lora --base_quantization=nf4"])
def test_a_model_is_trained_in_the_sums_that_it_will_draw_with(run: Run, case: str, precision: str) -> None:
    """The live model with weights in float32, and the saved one in the precision of the run; a LoRA bit for bit."""
    kind, *flags = case.split()
    flags += ["--learning_rate=1e-3", "--validation_prompt=a dog", "--validation_steps=2"]
    output = run(SCRIPTS[kind], f"--mixed_precision={precision}", *flags, "--train_text_encoder")
    names = ("validation/step_000000_0.png", "validation/step_000002_0.png", "image_0.png")
    first, live, saved = (np.asarray(Image.open(output / name), dtype=int) for name in names)
    error = (
        {"no": 0, "bf16": 1, "fp16": 0.1}[precision] if kind == "full" else 0
    )  # of 255, where weights are rounded once
    assert abs(live - saved).mean() <= error and not np.array_equal(first, live)


@pytest.mark.parametrize("half", [("bf16", 0.06), ("fp16", 5e-4)])
def test_losses_in_half_precision_are_near_those_in_float32(
    script: ModuleType, run: Run, half: tuple[str, float], monkeypatch: pytest.MonkeyPatch, logged: list[dict]
) -> None:
    (precision, error), _ = half, set_up_fp16(script, monkeypatch)
    for name in ("no", precision):
        run(script, f"--mixed_precision={name}", "--train_batch_size=5", "--max_train_steps=10")
    losses = [values["loss"] for values in logged]
    assert len(losses) == 20 and losses[10:] == pytest.approx(losses[:10], rel=2 * error)
    assert sum(losses[10:]) == pytest.approx(sum(losses[:10]), rel=error)


def test_validation_leaves_the_live_model_as_it_is(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    during, validate = set[Any](), script.validate

    def check(live: Any) -> None:
        def places() -> set[tuple[int, torch.dtype]]:
            return {(value.data_ptr(), value.dtype) for value in all_parameters(live).values()}

        def modes() -> list[bool]:
            return [module.training for model in live.models for module in model.modules()]

        before = places(), modes(), {name: value.detach().clone() for name, value in all_parameters(live).items()}
        layer = live.transformer.proj_out
        hook = layer.register_forward_pre_hook(lambda *_: during.update({*places(), layer.training}))
        validate(live)
        hook.remove()
        assert during == {*before[0], False}  # no dropout
        assert (places(), modes()) == before[:2] and all(modes())
        assert all(torch.equal(value, before[2][name]) for name, value in all_parameters(live).items())

    monkeypatch.setattr(script, "validate", check)
    monkeypatch.setattr(script, "VALIDATION_SIGMAS", 1)  # in place of 8: of each part of a validation there is one
    flags = ["--train_text_encoder", "--validation_prompt=a dog", "--validation_loss", "--validation_epochs=1"]
    run(script, "--mixed_precision=bf16", *flags, "--train_batch_size=5")
    assert during


def test_fp16_trains_the_same_gradients_at_any_scale(script: ModuleType, run: Run, logged: list[dict]) -> None:
    """They are clipped, and their norm logged, at their true size."""
    flags = ("--max_train_steps=6", "--learning_rate=1e-3", "--mixed_precision=fp16")
    for scale in (2.0**8, 2.0**4):
        with pytest.MonkeyPatch.context() as patch:
            set_up_fp16(script, patch, scale)
            run(script, *flags)
    steps = [(values["loss"], values["grad_norm"]) for values in logged]
    assert steps[6] == pytest.approx(steps[0], rel=1e-2) and steps[11] == pytest.approx(steps[5], rel=5e-2)


def test_a_step_whose_gradients_overflow_is_skipped_and_training_goes_on(
    script: ModuleType, run: Run, logged: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = set_up_fp16(script, monkeypatch, 2.0**24)
    output = run(script, "--max_train_steps=14", "--checkpointing_steps=1", "--mixed_precision=fp16")
    assert scaler.get_scale() < 2.0**24
    weights = [load_file(output / f"checkpoint-{step}" / WEIGHTS[script.__name__]) for step in (1, 2, 14)]
    first, second, last = (torch.cat([state[name].flatten() for name in sorted(state)]) for state in weights)
    assert torch.equal(first, second), "an overflowing step moved the weights"
    assert not torch.equal(second, last) and last.isfinite().all() and len(logged) == 14


@one_script
def test_gradients_that_are_never_finite_end_a_run_in_fp16(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler skips such steps; a run of nothing else would end well, with the weights that it began with."""
    training_loss = script.training_loss

    def spoil(*given: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = training_loss(*given)
        losses["loss"].register_hook(lambda gradient: gradient * torch.nan)
        return losses

    set_up_fp16(script, monkeypatch, 2.0**16)
    monkeypatch.setattr(script, "training_loss", spoil)
    with pytest.raises(SystemExit, match=r"at step 3\d, its gradient's norm nan"):
        run(script, "--mixed_precision=fp16", "--max_train_steps=60")
