"""One training step is the formula: sigmas, noise, the call of the model, the loss and every gradient."""

import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from conftest import Run, one_script

pytestmark = one_script

SCHEMES = ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]
HEIGHT, WIDTH = 6, 4  # of latents; not square, so that rows and columns cannot be mixed up
GUIDANCE = 2.5


def options(scheme: str = "none", **numbers: float) -> SimpleNamespace:
    """The flags that a loss may depend on, with their defaults but for those given."""
    defaults = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, "guidance_scale": GUIDANCE}
    return SimpleNamespace(weighting_scheme=scheme, **defaults | numbers)


def random_step(batch: int, prior: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a step of `batch` instance pictures, with `prior` as many class pictures; the weights differ."""
    generator = torch.Generator().manual_seed(batch)
    count = 2 * batch if prior else batch

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator).to(dtype)

    return {
        "latents": normal(16, HEIGHT, WIDTH),
        "noise": normal(16, HEIGHT, WIDTH),
        "sigmas": torch.rand(count, generator=generator) * 0.9 + 0.05,
        "prompt_embeds": normal(5, 32),
        "pooled_prompt_embeds": normal(32),
        "loss_weights": torch.tensor([0.5, 0.3, 0.2])[:batch].repeat(count // batch) * torch.linspace(1, 0.4, count),
    }


def reference_velocity(transformer: Any, step: dict[str, Tensor], index: int, sigma: float) -> Tensor:
    """The model's velocity for one picture alone, (C, H, W), with tokens and ids laid out by hand."""
    noisy = (1 - sigma) * step["latents"][index] + sigma * step["noise"][index]
    corners = [(row, column) for row in range(0, HEIGHT, 2) for column in range(0, WIDTH, 2)]
    tokens = torch.stack([noisy[:, row : row + 2, column : column + 2].flatten() for row, column in corners])
    output = transformer(
        hidden_states=tokens[None],
        encoder_hidden_states=step["prompt_embeds"][index : index + 1],
        pooled_projections=step["pooled_prompt_embeds"][index : index + 1],
        timestep=torch.tensor([sigma]),
        guidance=torch.tensor([GUIDANCE]) if transformer.config.guidance_embeds else None,
        img_ids=torch.tensor([[0.0, row / 2, column / 2] for row, column in corners]),
        txt_ids=torch.zeros(5, 3),
    ).sample[0]
    velocity = torch.zeros_like(noisy)
    for (row, column), token in zip(corners, output, strict=True):
        velocity[:, row : row + 2, column : column + 2] = token.view(16, 2, 2)
    return velocity


def reference_loss(transformer: nn.Module, step: dict[str, Tensor], scheme: str) -> Tensor:
    """The loss by formula, one picture after the other."""
    total = torch.zeros(())
    for index in range(len(step["latents"])):
        sigma = step["sigmas"][index].item()
        weight = {"sigma_sqrt": 1 / sigma**2, "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))}.get(scheme, 1.0)
        target = step["noise"][index] - step["latents"][index]
        loss = weight * ((reference_velocity(transformer, step, index, sigma) - target) ** 2).mean()
        total = total + step["loss_weights"][index] * loss
    return total


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("checkpoint", ["tiny_flux", "tiny_schnell"])
def test_loss_and_every_gradient_equal_the_formula(
    script: ModuleType, request: pytest.FixtureRequest, checkpoint: str, scheme: str
) -> None:
    folder = request.getfixturevalue(checkpoint)
    # With float64 weights 1e-6 is far above the rounding of a batch's matrix products; in float32 it is not.
    for batch, prior, dtype, tolerance in (
        (1, False, torch.float64, 1e-6),
        (3, True, torch.float64, 1e-6),
        (2, True, torch.float32, 1e-5),
    ):
        transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype)
        step = random_step(batch, prior, dtype)
        expected = reference_loss(transformer, step, scheme)
        loss = script.training_loss(transformer, script.StepInputs(**step, options=options(scheme)))["loss"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        wanted, got = gradients(transformer, expected), gradients(transformer, loss)
        errors = {name: ((got[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted}
        assert max(errors.values()) < tolerance, sorted(errors.items(), key=lambda item: -item[1])[:3]


def test_a_number_of_the_loss_is_logged_as_its_sum_over_the_step_and_may_be_missing(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, logged: list[dict[str, float]]
) -> None:
    seen, training_loss = list[float](), script.training_loss

    def record(transformer: nn.Module, inputs: Any) -> dict[str, Tensor]:
        losses = training_loss(transformer, inputs)
        seen.append(losses["loss"].item())
        if len(seen) != 3:  # the first micro-batch of the second step
            losses["twice"] = 2 * losses["loss"]
        return losses

    monkeypatch.setattr(script, "training_loss", record)
    run(script, "--train_batch_size=1", "--gradient_accumulation_steps=2")
    assert [values["loss"] for values in logged] == pytest.approx([seen[0] + seen[1], seen[2] + seen[3]])
    assert [values["twice"] for values in logged] == pytest.approx([2 * (seen[0] + seen[1]), 2 * seen[3]])


@pytest.fixture
def scheduler(tiny_flux: Path) -> Any:
    return FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_flux, subfolder="scheduler")


def reference_place(scheme: str, generator: torch.Generator, mean: float, deviation: float, scale: float) -> float:
    """Where in the table a sigma is drawn, by the formulas of https://arxiv.org/abs/2403.03206, section 3.1."""
    if scheme == "logit_normal":
        return 1 / (1 + math.exp(-(mean + deviation * torch.randn(1, generator=generator).item())))
    u = torch.rand(1, generator=generator).item()
    return 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u) if scheme == "mode" else u


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sigmas_are_drawn_by_the_scheme_each_with_its_own_generator_and_then_shifted(
    script: ModuleType, scheduler: Any, scheme: str
) -> None:
    numbers = {"logit_mean": 0.4, "logit_std": 1.5, "mode_scale": 0.8}
    for shift in (1.0, 2.5):
        seeded = [torch.Generator().manual_seed(seed) for seed in range(300)]
        sigmas = script.sample_sigmas(seeded, scheduler.sigmas, options(scheme, **numbers), shift)
        assert sigmas.dtype == torch.float32
        for seed, sigma in enumerate(sigmas.tolist()):
            place = reference_place(scheme, torch.Generator().manual_seed(seed), *numbers.values())
            drawn = 1 - math.floor(1000 * place) / 1000
            assert sigma == pytest.approx(shift * drawn / (1 + (shift - 1) * drawn), abs=1e-6)


def every_sigma(script: ModuleType, patch: pytest.MonkeyPatch, table: Tensor, shift: float) -> list[float]:
    """What is drawn from the middle of each place of a table."""
    places = iter(((torch.arange(len(table)) + 0.5) / len(table)).split(1))
    patch.setattr(script, "draw_density", lambda *_, **__: next(places))
    return script.sample_sigmas([torch.Generator()] * len(table), table, options(), shift).tolist()


def test_every_sigma_of_the_table_can_be_drawn(script: ModuleType, scheduler: Any, monkeypatch: Any) -> None:
    sigmas = every_sigma(script, monkeypatch, scheduler.sigmas, 1.0)
    assert sigmas == pytest.approx([(1000 - index) / 1000 for index in range(1000)], abs=1e-7)


def test_extreme_draws_take_the_ends_of_the_table(script: ModuleType, scheduler: Any) -> None:
    for scheme, number, extreme, expected in (
        ("logit_normal", "logit_mean", 1e4, 0.001),
        ("logit_normal", "logit_mean", -1e4, 1.0),
        ("mode", "mode_scale", 1e4, 1.0),  # the first draw with seed 0 is 0.496
    ):
        far, generator = options(scheme, **{number: extreme}), torch.Generator().manual_seed(0)
        assert script.sample_sigmas([generator], scheduler.sigmas, far, 1.0).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("tokens", [256, 1500, 4096])
def test_the_dynamic_shift_is_that_of_the_sampler_for_as_many_tokens(
    script: ModuleType, scheduler: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = np.linspace(1.0, 1 / 28, 28)
    shift = script.flow_shift("dynamic", tokens, scheduler.config)
    got = every_sigma(script, monkeypatch, torch.from_numpy(steps), shift)
    scheduler.set_timesteps(sigmas=steps.tolist(), mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    assert got == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-5)


@pytest.mark.parametrize(("flag", "buckets"), [("3", []), ("dynamic", ["--aspect_ratio_buckets=32,32;64,32;32,64"])])
def test_a_run_shifts_what_it_would_have_drawn_by_each_pictures_tokens(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, flag: str, buckets: list[str]
) -> None:
    drawn: list[tuple[int, float]] = []
    training_loss = script.training_loss

    def record(transformer: nn.Module, inputs: Any) -> dict[str, Tensor]:
        tokens = inputs.latents.shape[2] * inputs.latents.shape[3] // 4
        drawn.extend((tokens, sigma) for sigma in inputs.sigmas.tolist())
        return training_loss(transformer, inputs)

    monkeypatch.setattr(script, "training_loss", record)
    run(script, "--max_train_steps=5", *buckets)
    plain = list(drawn)
    drawn.clear()
    run(script, "--max_train_steps=5", *buckets, f"--flow_shift={flag}")
    assert len({tokens for tokens, _ in plain}) == (2 if buckets else 1) and len(drawn) == 5
    for (tokens, sigma), (same, shifted) in zip(plain, drawn, strict=True):
        factor = 3 if flag == "3" else math.exp(0.5 + 0.65 * (tokens - 256) / 3840)
        assert same == tokens
        assert shifted == pytest.approx(factor * sigma / (factor * sigma + 1 - sigma), rel=1e-5) and shifted != sigma


def test_tensors_that_are_not_on_the_host_are_not_pinned_again(script: ModuleType) -> None:
    # Of one process the device is "cuda", and what the VAE has made is on "cuda:0": the two are not equal. Only what is
    # in host memory can be pinned; tensors without memory stand here for those of a GPU.
    names = ("latents", "noise", "sigmas", "prompt_embeds", "pooled_prompt_embeds", "loss_weights")
    inputs = script.StepInputs(**{name: torch.empty(1, device="meta") for name in names}, options=options())
    assert inputs.to(torch.device("cuda")).latents.device.type == "meta"
