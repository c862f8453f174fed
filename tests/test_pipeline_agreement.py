"""What is trained is what FluxPipeline samples: layout, positions, prompts, scaling, sigma and the velocity's sign."""

import argparse
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from conftest import Run, one_script

pytestmark = one_script

SIDES = (6, 4)  # of latents: height and width
PIXELS = {"height": 48, "width": 32}
PROMPTS = ["a photo of sks dog", "a cat", " ".join(["a prompt that both encoders have to cut off"] * 20)]
checkpoints = pytest.mark.parametrize("checkpoint", ["tiny_flux", "tiny_schnell"])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pipeline(tiny_flux: Path) -> FluxPipeline:
    return FluxPipeline.from_pretrained(tiny_flux)


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


@checkpoints
def test_training_calls_the_model_with_what_the_pipeline_calls_it_with(
    script: ModuleType, request: pytest.FixtureRequest, checkpoint: str
) -> None:
    pipeline = FluxPipeline.from_pretrained(request.getfixturevalue(checkpoint))
    model = Model(pipeline.transformer, torch.zeros(1, 6, 64))
    latents, noise, sigma = normal(1, 16, *SIDES, seed=0), normal(1, 16, *SIDES, seed=1), 0.37
    packed = FluxPipeline._pack_latents((1 - sigma) * latents + sigma * noise, 1, 16, *SIDES)
    sigmas = [unshifted(pipeline.scheduler, sigma, 6)]
    pipeline(**embeds(), **PIXELS, latents=packed, sigmas=sigmas, guidance_scale=2.0, output_type="latent")
    options, sigmas = argparse.Namespace(weighting_scheme="none", guidance_scale=2.0), torch.tensor([sigma])
    inputs = script.StepInputs(latents, noise, sigmas, **embeds(), loss_weights=torch.ones(1), options=options)
    script.training_loss(pipeline.transformer, inputs)
    expected, got = model.calls
    assert got.keys() == expected.keys() - {"joint_attention_kwargs"}
    guidance = got.pop("guidance")
    assert (guidance is None) == (checkpoint == "tiny_schnell") and guidance == expected["guidance"]
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0)


@checkpoints
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_are_encoded_as_the_pipeline_encodes_them_and_by_a_trained_clip_too(
    script: ModuleType, base_flags: list[str], tiny_flux: Path, dtype: torch.dtype
) -> None:
    pipeline = FluxPipeline.from_pretrained(tiny_flux, transformer=None, vae=None, torch_dtype=dtype)
    args = script.parse_args([*base_flags, "--max_sequence_length=512"])
    encoded = script.encode_prompts(args, argparse.Namespace(device=torch.device("cpu")), PROMPTS, dtype)
    assert list(encoded) == PROMPTS
    for prompt, embeds in encoded.items():
        with torch.no_grad():  # as in sampling; with gradients another kernel runs, which rounds differently
            prompt_embeds, pooled_prompt_embeds, _ = pipeline.encode_prompt(prompt, max_sequence_length=512)
        assert torch.equal(embeds.prompt_embeds[None], prompt_embeds) and prompt_embeds.shape[1] == 512
        assert torch.equal(embeds.pooled_prompt_embeds[None], pooled_prompt_embeds)
        live = script.embed_prompt(pipeline.text_encoder, embeds).pooled_prompt_embeds[None]
        torch.testing.assert_close(live, pooled_prompt_embeds, rtol=1e-6, atol=1e-6)


def test_latents_are_a_draw_from_the_posterior_shifted_and_scaled_as_the_vae_says(
    script: ModuleType, run: Run, pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, prepare_inputs = list[tuple[dict, Any]](), script.prepare_inputs

    def record(running: Any, batch: dict) -> Any:
        seen.append((batch, prepare_inputs(running, batch)))
        return seen[-1][1]

    monkeypatch.setattr(script, "prepare_inputs", record)
    run(script, "--train_batch_size=2", "--max_train_steps=1", "--seed=3")
    [(batch, inputs)] = seen
    for pixels, key, latents in zip(batch["pixels"], batch["keys"], inputs.latents, strict=True):
        generator = script.generator_for(3, "posterior", "instance", key.epoch, key.position)
        drawn = pipeline.vae.encode(pixels[None]).latent_dist.sample(generator)
        torch.testing.assert_close(latents[None], (drawn - 0.1159) * 0.3611, rtol=1e-4, atol=1e-5)
