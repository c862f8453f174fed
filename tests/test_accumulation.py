"""Micro-batches of a step are one batch: same weights, same logged loss; class pictures keep prompt and weight."""

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


def saved_weights(folder: Path) -> Tensor:
    """All weights that a run saved, LoRA or transformer, one after the other."""
    files = [*folder.glob("pytorch_lora_weights.safetensors"), *folder.glob("transformer/*.safetensors")]
    state = {name: value for file in files for name, value in load_file(file).items()}
    assert {value.dtype for value in state.values()} == {torch.float32}
    return torch.cat([state[name].double().flatten() for name in sorted(state)])


def batch_flags(batch_size: int, accumulation: int) -> list[str]:
    split = [f"--train_batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation}"]
    return [*split, "--max_train_steps=3", "--upcast_before_saving"]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What the steps of the runs log, in order."""
    values: list[dict[str, float]] = []
    monkeypatch.setattr(Accelerator, "log", lambda self, entry, *_, **__: values.append(entry))
    return values


@pytest.fixture
def prior_flags(tmp_path: Path) -> list[str]:
    """Class pictures all black, with a prompt of their own."""
    (tmp_path / "class").mkdir()
    for index in range(3):
        Image.new("RGB", (40, 32)).save(tmp_path / "class" / f"{index}.png")
    flags = ["--with_prior_preservation", f"--class_data_dir={tmp_path / 'class'}", "--class_prompt=a photo of a dog"]
    return [*flags, "--num_class_images=3", "--prior_loss_weight=0.3"]


@both_scripts
@pytest.mark.parametrize(("whole", "part", "prior"), [(2, 1, False), (4, 1, True)])  # steps of 2, 2, 1, or of 4, 1, 4
def test_micro_batches_train_and_log_as_one_batch(
    script: ModuleType, run: Run, tmp_path: Path, logged: list[dict[str, float]], prior_flags: list[str],
    whole: int, part: int, prior: bool,
) -> None:  # fmt: skip
    def train(name: str, *flags: str) -> Tensor:
        own = prior_flags if prior else []
        return saved_weights(run(script, *own, *LINEAR, *flags, f"--output_dir={tmp_path / name}"))

    start = train("start", *batch_flags(4, 1), "--learning_rate=0", "--max_train_steps=1")
    logged.clear()
    expected = train("whole", *batch_flags(whole, 1))
    got = train("parts", *batch_flags(part, whole // part))
    assert (got - expected).norm() < 1e-5 * (expected - start).norm()
    assert len(logged) == 6
    for one, other in zip(logged[:3], logged[3:], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("cache", [[], ["--cache_latents"]], ids=["pixels", "cached"])
def test_each_half_of_a_batch_has_its_own_pictures_and_prompt(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_flux: Path,
    prior_flags: list[str], cache: list[str],
) -> None:  # fmt: skip
    """White pictures of the subject, black ones of the class."""
    steps, training_loss = list[Any](), script.training_loss
    monkeypatch.setattr(script, "training_loss", lambda *given: steps.append(given[1]) or training_loss(*given))
    (tmp_path / "white").mkdir()
    for index in range(2):
        Image.new("RGB", (32, 40), "white").save(tmp_path / "white" / f"{index}.png")
    run(script, *prior_flags, *cache, f"--instance_data_dir={tmp_path / 'white'}", "--train_batch_size=2")

    pipeline = FluxPipeline.from_pretrained(tiny_flux, transformer=None, vae=None)
    prompts = ["a photo of sks dog", "a photo of a dog"]
    texts = [pipeline.encode_prompt(prompt, max_sequence_length=16) for prompt in prompts]
    vae = AutoencoderKL.from_pretrained(tiny_flux, subfolder="vae")
    posteriors = [vae.encode(torch.full((1, 3, 32, 32), colour)).latent_dist for colour in (1.0, -1.0)]
    assert [len(inputs.latents) for inputs in steps] == [4, 2]
    for inputs in steps:
        half = len(inputs.latents) // 2
        for place, latents in enumerate(inputs.latents):
            prompt_embeds, pooled_prompt_embeds, _ = texts[place // half]
            torch.testing.assert_close(inputs.prompt_embeds[place], prompt_embeds[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(inputs.pooled_prompt_embeds[place], pooled_prompt_embeds[0])
            sample = latents / vae.config.scaling_factor + vae.config.shift_factor
            drawn = (sample - posteriors[place // half].mean[0]) / posteriors[place // half].std[0]
            assert abs(drawn.mean()) < 0.3 and abs(drawn.std() - 1) < 0.3  # of 256: five deviations
