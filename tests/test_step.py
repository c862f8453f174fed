"""One training step is the formula: sigmas, noise, the call of the model, the loss and every gradient."""

import functools
import itertools
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from conftest import Run, one_script

pytestmark = one_script

SCHEMES = ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]
HEIGHT, WIDTH = 6, 4  # of latents; not square, so that rows and columns cannot be mixed up


class Step(NamedTuple):
    """The tensors of one step, named as in `StepInputs`."""

    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    guidance: Tensor | None
    loss_weights: Tensor


def options(scheme: str = "none", **numbers: float) -> SimpleNamespace:
    """The flags that a loss may depend on, with their defaults but for those given."""
    defaults = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, "prior_loss_weight": 1.0}
    return SimpleNamespace(weighting_scheme=scheme, **defaults | numbers)


def random_step(batch: int, prior: bool, guided: bool, dtype: torch.dtype) -> Step:
    """A step of `batch` instance pictures with weights that differ, and as many class pictures with `prior`."""
    generator = torch.Generator().manual_seed(batch)
    count = 2 * batch if prior else batch

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator).to(dtype)

    return Step(
        latents=normal(16, HEIGHT, WIDTH),
        noise=normal(16, HEIGHT, WIDTH),
        sigmas=torch.rand(count, generator=generator) * 0.9 + 0.05,
        prompt_embeds=normal(5, 32),
        pooled_prompt_embeds=normal(32),
        guidance=torch.rand(count, generator=generator) * 4 + 1 if guided else None,
        loss_weights=torch.tensor([0.5, 0.3, 0.2])[:batch].repeat(count // batch) * torch.linspace(1, 0.4, count),
    )


def reference_velocity(transformer: nn.Module, step: Step, index: int, sigma: float) -> Tensor:
    """The model's velocity for one picture alone, (C, H, W), with tokens and ids laid out by hand."""
    noisy = (1 - sigma) * step.latents[index] + sigma * step.noise[index]
    corners = [(row, column) for row in range(0, HEIGHT, 2) for column in range(0, WIDTH, 2)]
    tokens = torch.stack([noisy[:, row : row + 2, column : column + 2].flatten() for row, column in corners])
    output = transformer(
        hidden_states=tokens[None],
        encoder_hidden_states=step.prompt_embeds[index : index + 1],
        pooled_projections=step.pooled_prompt_embeds[index : index + 1],
        timestep=torch.tensor([sigma]),
        guidance=None if step.guidance is None else step.guidance[index : index + 1],
        img_ids=torch.tensor([[0.0, row / 2, column / 2] for row, column in corners]),
        txt_ids=torch.tensor([[0.0, 0.0, 0.0]] * step.prompt_embeds.shape[1]),
    ).sample[0]
    velocity = torch.zeros_like(noisy)
    for (row, column), token in zip(corners, output, strict=True):
        velocity[:, row : row + 2, column : column + 2] = token.view(16, 2, 2)
    return velocity


def reference_loss(transformer: nn.Module, step: Step, scheme: str) -> Tensor:
    """The loss by formula, one picture after the other."""
    total = torch.zeros(())
    for index in range(len(step.latents)):
        sigma = step.sigmas[index].item()
        weight = {"sigma_sqrt": 1 / sigma**2, "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))}.get(scheme, 1.0)
        target = step.noise[index] - step.latents[index]
        loss = weight * ((reference_velocity(transformer, step, index, sigma) - target) ** 2).mean()
        total = total + step.loss_weights[index] * loss
    return total


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@functools.cache
def load_transformer(folder: Path, dtype: torch.dtype) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype)


def check_step(script: ModuleType, folder: Path, dtype: torch.dtype, tolerance: float, **case: Any) -> None:
    transformer = load_transformer(folder, dtype)
    step = random_step(case["batch"], case["prior"], transformer.config.guidance_embeds, dtype)
    expected = reference_loss(transformer, step, case["scheme"])
    loss = script.training_loss(transformer, script.StepInputs(*step, options(case["scheme"])))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6), case
    wanted, got = gradients(transformer, expected), gradients(transformer, loss)
    errors = {name: ((got[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted}
    assert max(errors.values()) < tolerance, (case, sorted(errors.items(), key=lambda item: -item[1])[:3])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_loss_and_every_gradient_equal_the_formula(
    script: ModuleType, tiny_flux: Path, tiny_schnell: Path, scheme: str
) -> None:
    # With float64 weights 1e-6 is far above the rounding of a batch's matrix products; in float32 it is not.
    for folder, prior, batch in itertools.product((tiny_flux, tiny_schnell), (False, True), (1, 2, 3)):
        check_step(script, folder, torch.float64, 1e-6, scheme=scheme, prior=prior, batch=batch)


@pytest.mark.parametrize("checkpoint", ["tiny_flux", "tiny_schnell"])
def test_loss_and_every_gradient_equal_the_formula_in_float32(
    script: ModuleType, request: pytest.FixtureRequest, checkpoint: str
) -> None:
    folder = request.getfixturevalue(checkpoint)
    check_step(script, folder, torch.float32, 1e-5, scheme="cosmap", prior=True, batch=3)


def test_the_loss_is_the_instance_mean_plus_the_weighted_class_mean(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, training_loss = list[list[float]](), script.training_loss

    def record(transformer: nn.Module, inputs: Any) -> Tensor:
        weights.append(inputs.loss_weights.tolist())
        return training_loss(transformer, inputs)

    monkeypatch.setattr(script, "training_loss", record)
    flags = ["--with_prior_preservation", "--class_prompt=a dog", f"--class_data_dir={tmp_path / 'class'}"]
    run(script, *flags, "--num_class_images=2", "--prior_loss_weight=0.1", "--train_batch_size=3")
    assert weights == [pytest.approx([1 / count] * count + [0.1 / count] * count) for count in (3, 2)]  # of five


def test_numbers_of_the_loss_are_logged_as_its_mean_is(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged, training_loss = list[dict[str, float]](), script.training_loss

    def record(transformer: nn.Module, inputs: Any) -> Tensor:
        inputs.logged["twice"] = 2 * training_loss(transformer, inputs)
        return inputs.logged["twice"] / 2

    monkeypatch.setattr(script, "training_loss", record)
    monkeypatch.setattr(Accelerator, "log", lambda _, values, **__: logged.append(values))
    run(script, "--train_batch_size=2", "--gradient_accumulation_steps=2")
    assert len(logged) == 2
    assert [values["twice"] for values in logged] == pytest.approx([2 * values["loss"] for values in logged])


def test_noise_is_added_on_a_straight_line_with_each_pictures_sigma(script: ModuleType) -> None:
    latents, noise = torch.full((3, 2, 4, 4), 8.0), torch.full((3, 2, 4, 4), -2.0)
    noisy = script.add_noise(latents, noise, torch.tensor([0.0, 0.3, 1.0]))
    for picture, expected in zip(noisy, (8.0, 0.7 * 8 - 0.3 * 2, -2.0), strict=True):
        assert picture.flatten().tolist() == pytest.approx([expected] * 32)


@pytest.fixture
def sigma_table(tiny_flux: Path) -> Tensor:
    return FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_flux, subfolder="scheduler").sigmas


def reference_place(scheme: str, generator: torch.Generator, mean: float, deviation: float, scale: float) -> float:
    """Where in the table a sigma is drawn, by the formulas of https://arxiv.org/abs/2403.03206, section 3.1."""
    if scheme == "logit_normal":
        return 1 / (1 + math.exp(-(mean + deviation * torch.randn(1, generator=generator).item())))
    u = torch.rand(1, generator=generator).item()
    return 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u) if scheme == "mode" else u


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sigmas_are_drawn_by_the_scheme_each_with_its_own_generator(
    script: ModuleType, sigma_table: Tensor, scheme: str
) -> None:
    numbers = {"logit_mean": 0.4, "logit_std": 1.5, "mode_scale": 0.8}
    seeded = [torch.Generator().manual_seed(seed) for seed in range(500)]
    sigmas = script.sample_sigmas(seeded, sigma_table, options(scheme, **numbers), 1.0)
    for seed, sigma in enumerate(sigmas.tolist()):
        place = reference_place(scheme, torch.Generator().manual_seed(seed), *numbers.values())
        assert sigma == pytest.approx(1 - math.floor(1000 * place) / 1000, abs=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_shift_comes_after_the_draw(script: ModuleType, sigma_table: Tensor, scheme: str) -> None:
    seeded = [[torch.Generator().manual_seed(seed) for seed in range(200)] for _ in range(2)]
    drawn = script.sample_sigmas(seeded[0], sigma_table, options(scheme), 1.0)
    shifted = script.sample_sigmas(seeded[1], sigma_table, options(scheme), 2.5)
    odds = shifted.double() / (1 - shifted.double())  # a shift multiplies the odds of noise
    inner = drawn < 1
    assert torch.allclose(odds[inner], 2.5 * (drawn.double() / (1 - drawn.double()))[inner], rtol=1e-3)
    assert shifted.dtype == torch.float32 and torch.equal(shifted[~inner], drawn[~inner])


@pytest.mark.parametrize("tokens", [256, 1024, 2304, 4096, 1500])
def test_the_dynamic_shift_is_that_of_the_sampler_for_as_many_tokens(
    script: ModuleType, tiny_flux: Path, tokens: int
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_flux, subfolder="scheduler")
    shift = script.flow_shift("dynamic", tokens, scheduler.config)
    steps = np.linspace(1.0, 1 / 28, 28)
    scheduler.set_timesteps(sigmas=steps.tolist(), mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    got = script.shift_sigmas(torch.from_numpy(steps), shift)
    assert got.tolist() == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-5)


def test_the_dynamic_shift_takes_the_schedulers_own_constants(script: ModuleType) -> None:
    config = SimpleNamespace(base_shift=0.1, max_shift=0.9, base_image_seq_len=100, max_image_seq_len=300)
    shifts = [math.log(script.flow_shift("dynamic", tokens, config)) for tokens in (100, 150, 300)]
    assert shifts == pytest.approx([0.1, 0.3, 0.9])


def test_without_a_shift_sigmas_are_bit_for_bit_those_of_the_table(script: ModuleType, sigma_table: Tensor) -> None:
    assert script.flow_shift(None, 1024, None) == 1.0 and script.flow_shift(3, 1024, None) == 3.0
    assert torch.equal(script.shift_sigmas(sigma_table, 1.0), sigma_table)


@pytest.mark.parametrize(("flag", "buckets"), [("3", ""), ("dynamic", ""), ("dynamic", "32,32;64,32;32,64")])
def test_a_run_shifts_what_it_would_have_drawn_by_each_pictures_tokens(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, flag: str, buckets: str
) -> None:
    drawn: list[tuple[int, float]] = []
    training_loss = script.training_loss

    def record(transformer: nn.Module, inputs: Any) -> Tensor:
        tokens = inputs.latents.shape[2] * inputs.latents.shape[3] // 4
        drawn.extend((tokens, sigma) for sigma in inputs.sigmas.tolist())
        return training_loss(transformer, inputs)

    monkeypatch.setattr(script, "training_loss", record)
    flags = ["--max_train_steps=5", f"--aspect_ratio_buckets={buckets}"]
    run(script, *flags)
    plain = list(drawn)
    drawn.clear()
    run(script, *flags, f"--flow_shift={flag}")
    assert len({tokens for tokens, _ in plain}) == (2 if buckets else 1) and len(drawn) == 5
    for (tokens, sigma), (same, shifted) in zip(plain, drawn, strict=True):
        mu = 0.5 + 0.65 * (tokens - 256) / 3840
        factor = 3 if flag == "3" else math.exp(mu)
        assert same == tokens
        assert shifted == pytest.approx(factor * sigma / (factor * sigma + 1 - sigma), rel=1e-5) and shifted != sigma


@pytest.mark.parametrize(
    ("scheme", "numbers", "expected"),
    [
        ("logit_normal", {"logit_mean": 1e4}, 0.001),
        ("logit_normal", {"logit_mean": -1e4}, 1.0),
        ("mode", {"mode_scale": 1e4}, 1.0),
        ("mode", {"mode_scale": -1e4}, 0.001),
    ],
)
def test_extreme_draws_take_the_ends_of_the_table(
    script: ModuleType, sigma_table: Tensor, scheme: str, numbers: dict[str, float], expected: float
) -> None:
    # The first draw with seed 0 is 0.496, where a large mode_scale leaves [0, 1] far below.
    sigmas = script.sample_sigmas([torch.Generator().manual_seed(0)], sigma_table, options(scheme, **numbers), 1.0)
    assert sigmas.tolist() == pytest.approx([expected])


def test_every_sigma_of_the_table_can_be_drawn_in_float32(
    script: ModuleType, sigma_table: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    middles = ((torch.arange(1000) + 0.5) / 1000).unsqueeze(1).unbind()
    places = iter(middles)
    monkeypatch.setattr(script, "compute_density_for_timestep_sampling", lambda *_, **__: next(places))
    sigmas = script.sample_sigmas([torch.Generator()] * 1000, sigma_table, options(), 1.0)
    assert sigmas.dtype == torch.float32
    assert sigmas.tolist() == pytest.approx([(1000 - index) / 1000 for index in range(1000)], abs=1e-7)


class Recorder(nn.Module):
    """Stands in for the transformer: keeps what it was called with."""

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        self.inputs = inputs
        return (inputs["hidden_states"],)


@pytest.mark.parametrize("guided", [True, False], ids=["guidance", "no guidance"])
def test_the_model_takes_sigma_as_its_timestep_and_guidance_and_text_as_they_are(
    script: ModuleType, guided: bool
) -> None:
    step, model = random_step(2, False, guided, torch.float32), Recorder()
    script.training_loss(model, script.StepInputs(*step, options()))
    assert model.inputs["timestep"].dtype == torch.float32
    assert model.inputs["timestep"].tolist() == step.sigmas.tolist()
    assert model.inputs["guidance"] is step.guidance
    assert torch.equal(model.inputs["encoder_hidden_states"], step.prompt_embeds)
    assert torch.equal(model.inputs["pooled_projections"], step.pooled_prompt_embeds)


@pytest.mark.parametrize(("checkpoint", "guidance"), [("tiny_flux", [2.5, 2.5]), ("tiny_schnell", None)])
def test_a_run_tells_the_model_the_guidance_that_its_config_asks_for(
    script: ModuleType,
    run: Run,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: str,
    guidance: list[float] | None,
) -> None:
    calls, predict_velocity = [], script.predict_velocity

    def record(transformer: nn.Module, noisy: Tensor, sigmas: Tensor, *inputs: Tensor) -> Tensor:
        calls.append((sigmas, inputs[-1]))
        return predict_velocity(transformer, noisy, sigmas, *inputs)

    monkeypatch.setattr(script, "predict_velocity", record)
    folder = request.getfixturevalue(checkpoint)
    run(script, f"--pretrained_model_name_or_path={folder}", "--guidance_scale=2.5", "--train_batch_size=2")
    for sigmas, told in calls:
        assert sigmas.shape == (2,)
        assert sigmas.dtype == torch.float32
        assert (None if told is None else told.tolist()) == guidance
    assert len(calls) == 2
