"""Micro-batches of a step are one batch: same weights, same logged loss; class pictures keep prompt and weight."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from conftest import Run, both_scripts, one_script

pytestmark = one_script

# Without clipping, and with an epsilon above most gradients, an update is nearly proportional to its gradient: a wrong
# scale shows, and the order of a sum is not blown up. Step by step AdamW's own 1e-8 takes a gradient's sign.
LINEAR = ("--learning_rate=0.01", "--adam_epsilon=0.1", "--max_grad_norm=0")
# Of five pictures: steps of 2, 2, 1, or of 4, 1, 4.
SPLITS = [(2, 1), (4, 2), (4, 1)]


def saved_weights(folder: Path) -> Tensor:
    """All weights that a run saved, LoRA or transformer, one after the other."""
    files = [*folder.glob("pytorch_lora_weights.safetensors"), *folder.glob("transformer/*.safetensors")]
    state = {name: value for file in files for name, value in load_file(file).items()}
    assert {value.dtype for value in state.values()} == {torch.float32}
    return torch.cat([state[name].double().flatten() for name in sorted(state)])


def batch_flags(batch_size: int, accumulation: int) -> tuple[str, ...]:
    return (
        f"--train_batch_size={batch_size}",
        f"--gradient_accumulation_steps={accumulation}",
        "--max_train_steps=3",
        "--upcast_before_saving",
    )


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What the steps of the runs log, in order."""
    values: list[dict[str, float]] = []
    monkeypatch.setattr(Accelerator, "log", lambda self, entry, *_, **__: values.append(entry))
    return values


@pytest.fixture
def losses(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The losses of the pictures of each micro-batch."""
    values: list[list[float]] = []
    flow_matching_loss = script.flow_matching_loss

    def record(*inputs: Any) -> Tensor:
        result: Tensor = flow_matching_loss(*inputs)
        values.append(result.tolist())
        return result

    monkeypatch.setattr(script, "flow_matching_loss", record)
    return values


@pytest.fixture
def prior_flags(tmp_path: Path) -> list[str]:
    """Class pictures all black, with a prompt of their own."""
    for index in range(3):
        Image.new("RGB", (40, 32)).save(tmp_path / f"class_{index}.png")
    return [
        "--with_prior_preservation",
        f"--class_data_dir={tmp_path}",
        "--class_prompt=a photo of a dog",
        "--num_class_images=3",
        "--prior_loss_weight=0.3",
    ]


@pytest.fixture(params=["instance", "prior"])
def kind_flags(request: pytest.FixtureRequest) -> list[str]:
    return request.getfixturevalue("prior_flags") if request.param == "prior" else []


@both_scripts
@pytest.mark.parametrize(("whole", "part"), SPLITS)
def test_micro_batches_train_and_log_as_one_batch(
    script: ModuleType,
    run: Run,
    tmp_path: Path,
    kind_flags: list[str],
    logged: list[dict[str, float]],
    whole: int,
    part: int,
) -> None:
    def train(name: str, *flags: str) -> Tensor:
        return saved_weights(run(script, *kind_flags, *LINEAR, *flags, f"--output_dir={tmp_path / name}"))

    start = train("start", *batch_flags(4, 1), "--learning_rate=0", "--max_train_steps=1")
    logged.clear()
    expected = train("whole", *batch_flags(whole, 1))
    got = train("parts", *batch_flags(part, whole // part))
    assert (got - expected).norm() < 1e-5 * (expected - start).norm()
    assert len(logged) == 6
    for one, other in zip(logged[:3], logged[3:], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_the_logged_loss_is_the_mean_over_the_pictures_of_the_step(
    script: ModuleType, run: Run, logged: list[dict[str, float]], losses: list[list[float]]
) -> None:
    run(script, *batch_flags(1, 2))
    [[first], [second], [third], [fourth], [fifth]] = losses
    expected = [(first + second) / 2, (third + fourth) / 2, fifth]
    assert [values["loss"] for values in logged] == pytest.approx(expected, rel=1e-6)


def test_with_prior_preservation_the_loss_is_the_instance_mean_plus_the_weighted_class_mean(
    script: ModuleType, run: Run, prior_flags: list[str], logged: list[dict[str, float]], losses: list[list[float]]
) -> None:
    run(script, *prior_flags, *batch_flags(2, 2))  # steps of 2 + 2, 1 and 2 + 2 examples
    steps = [losses[:2], losses[2:3], losses[3:]]
    assert [[len(part) for part in parts] for parts in steps] == [[4, 4], [2], [4, 4]]
    for parts, values in zip(steps, logged, strict=True):
        instance = [loss for part in parts for loss in part[: len(part) // 2]]
        prior = [loss for part in parts for loss in part[len(part) // 2 :]]
        expected = sum(instance) / len(instance) + 0.3 * sum(prior) / len(prior)
        assert values["loss"] == pytest.approx(expected, rel=1e-6)


def test_every_picture_draws_its_own_noise_and_sigma_anew_in_every_epoch(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, prior_flags: list[str]
) -> None:
    noise, sigmas, training_loss = list[float](), list[float](), script.training_loss

    def record(transformer: Any, inputs: Any) -> Tensor:
        noise.extend(inputs.noise.flatten(1).sum(1).tolist())
        sigmas.extend(inputs.sigmas.tolist())
        return training_loss(transformer, inputs)

    monkeypatch.setattr(script, "training_loss", record)
    run(script, *prior_flags, "--train_batch_size=2", "--max_train_steps=6")
    assert len(set(noise)) == 2 * 5 * 2  # halves, examples, epochs
    assert len(set(sigmas)) > 15  # of a thousand, so that two may be the same by chance


def means_of_plain_pictures(checkpoint: Path) -> Iterator[Tensor]:
    """The VAE's latents of a white picture, the subject, and of a black one, the class."""
    vae = AutoencoderKL.from_pretrained(checkpoint, subfolder="vae")
    for value in (1.0, -1.0):
        yield vae.encode(torch.full((1, 3, 32, 32), value)).latent_dist.mean[0].detach()


@pytest.mark.parametrize("cache", [[], ["--cache_latents"]], ids=["pixels", "cached"])
def test_each_half_of_a_batch_has_its_own_pictures_and_prompt(
    script: ModuleType,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_flux: Path,
    prior_flags: list[str],
    cache: list[str],
) -> None:
    drawn, steps = list[Tensor](), list[Any]()
    sample_latents, training_loss = script.sample_latents, script.training_loss

    def record_latents(distribution: Any, *numbers: Any) -> Tensor:
        drawn.append(distribution.mean)
        return sample_latents(distribution, *numbers)

    def record_step(transformer: Any, inputs: Any) -> Tensor:
        steps.append(inputs)
        return training_loss(transformer, inputs)

    monkeypatch.setattr(script, "sample_latents", record_latents)
    monkeypatch.setattr(script, "training_loss", record_step)
    white = tmp_path / "white"
    white.mkdir()
    for index in range(2):
        Image.new("RGB", (32, 40), "white").save(white / f"{index}.png")
    run(script, *prior_flags, *cache, f"--instance_data_dir={white}", "--train_batch_size=2")

    pipeline = FluxPipeline.from_pretrained(tiny_flux, transformer=None, vae=None)
    prompts = ["a photo of sks dog", "a photo of a dog"]
    texts = [pipeline.encode_prompt(prompt, max_sequence_length=16) for prompt in prompts]
    means = list(means_of_plain_pictures(tiny_flux))
    assert [len(latents) for latents in drawn] == [4, 2]
    for latents, inputs in zip(drawn, steps, strict=True):
        half = len(latents) // 2
        for place, latent in enumerate(latents):
            prompt_embeds, pooled_prompt_embeds, _ = texts[place // half]
            torch.testing.assert_close(latent, means[place // half], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(inputs.prompt_embeds[place], prompt_embeds[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(inputs.pooled_prompt_embeds[place], pooled_prompt_embeds[0])
