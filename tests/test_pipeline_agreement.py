"""What is trained is what FluxPipeline samples: layout, positions, prompts, scaling, sigma and the velocity's sign."""

import argparse
import inspect
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from conftest import Run, one_script

pytestmark = one_script

SIDES = (6, 4)  # of latents: height and width
PIXELS = {"height": 48, "width": 32}
PROMPTS = ["a photo of sks dog", "a cat", " ".join(["a prompt that both encoders have to cut off"] * 20)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pipeline(tiny_flux: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def args(script: ModuleType, base_flags: list[str]) -> argparse.Namespace:
    return script.parse_args(base_flags)


@pytest.fixture
def accelerator(script: ModuleType, args: argparse.Namespace) -> Accelerator:
    return script.make_accelerator(args)


class Model:
    """Answers in a transformer's place with `velocity`, and keeps what it was called with."""

    def __init__(self, transformer: FluxTransformer2DModel, velocity: Tensor) -> None:
        self.velocity, self.calls = velocity, list[dict[str, Any]]()
        transformer.forward = self.answer

    def answer(self, **inputs: Any) -> tuple[Tensor]:
        self.calls.append(inputs)
        return (self.velocity,)


def embeds() -> dict[str, Tensor]:
    return {"prompt_embeds": normal(1, 7, 32, seed=2), "pooled_prompt_embeds": normal(1, 32, seed=3)}


def unshifted(scheduler: FlowMatchEulerDiscreteScheduler, sigma: float, tokens: int) -> float:
    """What the pipeline has to be given to sample at `sigma`: it shifts by exp(mu), which grows with the tokens."""
    if not scheduler.config.use_dynamic_shifting:
        return sigma
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    return 1 / (1 + math.exp(mu) * (1 / sigma - 1))


def learnt_velocity(script: ModuleType, latents: Tensor, noise: Tensor) -> Tensor:
    """The velocity at which the script's loss is lowest, from the slope of that parabola at zero."""
    velocity = torch.zeros(1, SIDES[0] * SIDES[1] // 4, 64, requires_grad=True)
    options = argparse.Namespace(weighting_scheme="none")
    target = script.pack_latents(noise - latents)
    script.flow_matching_loss(velocity, target, torch.ones(1), options).sum().backward()
    assert velocity.grad is not None
    return -velocity.grad * velocity.numel() / 2


def test_latents_are_packed_as_the_pipeline_packs_them(script: ModuleType) -> None:
    latents = normal(2, 16, 6, 4, seed=0)
    assert torch.equal(script.pack_latents(latents), FluxPipeline._pack_latents(latents, 2, 16, 6, 4))


def test_image_ids_are_the_pipelines(script: ModuleType) -> None:
    expected = FluxPipeline._prepare_latent_image_ids(1, 3, 2, torch.device("cpu"), torch.float32)
    assert torch.equal(script.make_image_ids(6, 4), expected)


@pytest.mark.parametrize("checkpoint", ["tiny_flux", "tiny_schnell"])
@pytest.mark.parametrize("sigma", [1.0, 0.37])
def test_training_calls_the_model_with_what_the_pipeline_calls_it_with(
    script: ModuleType, request: pytest.FixtureRequest, checkpoint: str, sigma: float
) -> None:
    pipeline = FluxPipeline.from_pretrained(request.getfixturevalue(checkpoint))
    model = Model(pipeline.transformer, torch.zeros(1, 6, 64))
    noisy = normal(1, 16, *SIDES, seed=0)
    packed = FluxPipeline._pack_latents(noisy, 1, 16, *SIDES)
    sigmas = [unshifted(pipeline.scheduler, sigma, 6)]
    pipeline(**embeds(), **PIXELS, latents=packed, sigmas=sigmas, guidance_scale=2.0, output_type="latent")
    guidance = torch.tensor([2.0]) if pipeline.transformer.config.guidance_embeds else None
    script.predict_velocity(pipeline.transformer, noisy, torch.tensor([sigma]), *embeds().values(), guidance)
    expected, inputs = model.calls
    assert inputs.keys() == expected.keys() - {"joint_attention_kwargs"}
    assert (inputs.pop("guidance") is None) == (guidance is None)
    for name, value in inputs.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0)
    assert guidance is None or expected["guidance"].tolist() == [2.0]


@pytest.mark.parametrize("checkpoint", ["tiny_flux", "tiny_schnell"])
@pytest.mark.parametrize("sigma", [1.0, 0.37])
def test_one_step_with_the_learnt_velocity_lands_on_the_picture_and_with_its_opposite_does_not(
    script: ModuleType, request: pytest.FixtureRequest, checkpoint: str, sigma: float
) -> None:
    pipeline = FluxPipeline.from_pretrained(request.getfixturevalue(checkpoint))
    latents, noise = normal(1, 16, *SIDES, seed=0), normal(1, 16, *SIDES, seed=1)
    velocity = learnt_velocity(script, latents, noise)
    start = script.pack_latents(script.add_noise(latents, noise, torch.tensor([sigma])))
    sigmas = [unshifted(pipeline.scheduler, sigma, 6)]

    def error(velocity: Tensor) -> float:
        Model(pipeline.transformer, velocity)
        landed = pipeline(**embeds(), **PIXELS, latents=start, sigmas=sigmas, output_type="latent").images
        return (landed - FluxPipeline._pack_latents(latents, 1, 16, *SIDES)).abs().max().item()

    assert error(velocity) < 1e-5
    assert error(-velocity) > 0.1


def test_one_step_from_the_pipelines_own_noise_lands_on_the_picture(script: ModuleType, pipeline: FluxPipeline) -> None:
    latents, noise = normal(1, 16, *SIDES, seed=0), normal(1, 16, *SIDES, seed=1)
    Model(pipeline.transformer, learnt_velocity(script, latents, noise))
    generator = torch.Generator().manual_seed(1)  # with which `noise` was drawn
    images = pipeline(**embeds(), **PIXELS, num_inference_steps=1, generator=generator, output_type="latent").images
    torch.testing.assert_close(images, FluxPipeline._pack_latents(latents, 1, 16, *SIDES), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_are_encoded_as_the_pipeline_encodes_them(
    script: ModuleType, args: argparse.Namespace, accelerator: Accelerator, tiny_flux: Path, dtype: torch.dtype
) -> None:
    pipeline = FluxPipeline.from_pretrained(tiny_flux, transformer=None, vae=None, torch_dtype=dtype)
    encoded = script.encode_prompts(args, accelerator, PROMPTS, dtype)
    assert list(encoded) == PROMPTS
    for prompt in PROMPTS:
        with torch.no_grad():  # as in sampling; with gradients another kernel runs, which rounds differently
            prompt_embeds, pooled_prompt_embeds, _ = pipeline.encode_prompt(prompt, max_sequence_length=16)
        assert torch.equal(encoded[prompt].prompt_embeds[None], prompt_embeds)
        assert torch.equal(encoded[prompt].pooled_prompt_embeds[None], pooled_prompt_embeds)
    assert not torch.equal(encoded["a cat"].prompt_embeds, encoded[PROMPTS[0]].prompt_embeds)


def test_a_trained_clip_pools_a_prompt_as_the_pipeline_does(
    script: ModuleType, args: argparse.Namespace, accelerator: Accelerator, pipeline: FluxPipeline
) -> None:
    for prompt, embeds in script.encode_prompts(args, accelerator, PROMPTS, torch.float32).items():
        pooled = script.embed_prompt(accelerator, pipeline.text_encoder, embeds).pooled_prompt_embeds[None]
        torch.testing.assert_close(pooled, pipeline.encode_prompt(prompt)[1], rtol=1e-6, atol=1e-6)


def test_latents_are_a_draw_from_the_posterior_shifted_and_scaled_as_the_vae_says(
    script: ModuleType, tiny_flux: Path
) -> None:
    config = AutoencoderKL.load_config(tiny_flux, subfolder="vae")
    mean, std, noise = (normal(2, 16, 4, 4, seed=seed) for seed in range(3))
    latents = script.sample_latents(script.LatentDistribution(mean, std), noise, argparse.Namespace(**config))
    torch.testing.assert_close(latents, (mean + std * noise - 0.1159) * 0.3611)


def test_a_run_scales_latents_by_the_vaes_numbers(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, sample_latents = list[tuple[float, ...]](), script.sample_latents

    def record(distribution: Any, noise: Tensor, config: Any) -> Tensor:
        numbers.append((config.shift_factor, config.scaling_factor))
        return sample_latents(distribution, noise, config)

    monkeypatch.setattr(script, "sample_latents", record)
    run(script)
    assert numbers == [(0.1159, 0.3611)] * 2


class Decoder(nn.Module):
    """Stands in for the VAE: keeps the latents that it is to decode."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.config, self.device, self.dtype = vae.config, torch.device("cpu"), torch.float32

    def decode(self, latents: Tensor) -> Any:
        self.latents = latents
        return argparse.Namespace(sample=torch.zeros(1, 3, 32, 32))


def draw(script: ModuleType, packed: Tensor, vae: Any) -> Any:
    """What `draw_pictures` makes of the latents that a sampler gives."""
    sampler = FluxPipeline(None, None, None, None, None, None, None)
    sampler.__class__ = type(
        "Sampler", (FluxPipeline,), {"__call__": lambda *_, **__: argparse.Namespace(images=packed)}
    )
    prompt = script.PromptEmbeds(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    return script.draw_pictures(sampler, vae, [prompt], (32, 32), torch.float32, [])[0]


def test_decoding_undoes_the_scaling_of_training(script: ModuleType, pipeline: FluxPipeline) -> None:
    drawn, decoder = normal(1, 16, 4, 4, seed=0), Decoder(pipeline.vae)
    distribution = script.LatentDistribution(drawn, torch.zeros_like(drawn))
    latents = script.sample_latents(distribution, torch.ones_like(drawn), pipeline.vae.config)
    draw(script, script.pack_latents(latents), decoder)
    torch.testing.assert_close(decoder.latents, drawn)


def test_latents_are_decoded_as_the_pipeline_decodes_them(script: ModuleType, pipeline: FluxPipeline) -> None:
    packed = normal(1, 4, 64, seed=0)
    Model(pipeline.transformer, torch.zeros_like(packed))
    expected = pipeline(**embeds(), height=32, width=32, latents=packed, num_inference_steps=1).images[0]
    assert np.array_equal(draw(script, packed, pipeline.vae), expected)


def test_pictures_drawn_on_the_way_are_those_of_the_pipeline(
    script: ModuleType, args: argparse.Namespace, accelerator: Accelerator, pipeline: FluxPipeline
) -> None:
    embeds = script.encode_prompts(args, accelerator, ["a cat"], torch.float32)["a cat"]
    models, numbers = (pipeline.transformer, pipeline.vae), range(args.num_validation_images)
    drawn = script.sample_pictures(args, accelerator, *models, [embeds], 5, numbers, "Validation")
    options = {"num_inference_steps": args.validation_num_inference_steps, "max_sequence_length": 16}
    generator = script.generator_for(5, "validation", 0)
    expected = pipeline("a cat", height=32, width=32, generator=generator, **options).images
    assert len(drawn) == 1
    assert np.abs(np.asarray(drawn[0], dtype=int) - np.asarray(expected[0], dtype=int)).max() <= 1
    assert np.asarray(expected[0]).std() > 1  # a picture of one colour would prove nothing


def test_pictures_are_drawn_with_the_pipelines_defaults_unless_asked_for_others(script: ModuleType) -> None:
    defaults = inspect.signature(FluxPipeline.__call__).parameters
    for name in ("guidance_scale", "num_inference_steps"):
        assert script.make_parser().get_default(f"validation_{name}") == defaults[name].default
