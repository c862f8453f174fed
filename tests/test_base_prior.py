"""`--prior_from_base_model`: the target of the class prompt is what the model without adapters predicts."""

import copy
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import train_dreambooth_lora_flux as script
from conftest import Run
from tests.test_step import options, random_step, reference_velocity

PRIOR = ("--prior_from_base_model", "--class_prompt=a photo of a dog")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[script.StepInputs]:
    """The inputs of each micro-batch of the training."""
    seen, training_loss = list[script.StepInputs](), script.training_loss

    def record(transformer: Any, inputs: script.StepInputs) -> dict[str, Tensor]:
        seen.append(inputs)
        return training_loss(transformer, inputs)

    monkeypatch.setattr(script, "training_loss", record)
    return seen


@pytest.mark.parametrize(
    "more",
    [[], ["--train_text_encoder"], ["--base_quantization=nf4"], ["--blocks_to_swap=2", "--gradient_checkpointing"]],
    ids=["plain", "CLIP", "nf4", "swapped"],
)
def test_with_fresh_adapters_the_prior_is_zero_and_then_it_is_not(
    run: Run, logged: list[dict[str, float]], more: list[str]
) -> None:
    """Its gradient is zero too, so that both runs take the same first step."""
    for flags in (PRIOR, ()):
        run(script, *flags, *more, "--learning_rate=1e-2", "--text_encoder_lr=1e-2")
    first, second, plain_first, plain_second = (values["loss"] for values in logged)
    assert first == pytest.approx(plain_first, rel=1e-6) and second > plain_second + 1e-5


def test_the_class_prompt_sees_the_same_noisy_pictures(run: Run, steps: list[tuple[script.StepInputs, Tensor]]) -> None:
    flags = ("--train_batch_size=2", "--cache_latents", "--random_flip", "--prior_loss_weight=0.7")
    run(script, *PRIOR, *flags)
    run(script, *flags)
    for both, plain in zip(steps[:2], steps[2:], strict=True):
        for name in ("latents", "noise", "sigmas"):
            instance, prior = getattr(both, name).chunk(2)
            assert torch.equal(instance, prior) and torch.equal(instance, getattr(plain, name)), name
        instance, prior = both.prompt_embeds.chunk(2)
        assert torch.equal(instance, plain.prompt_embeds) and not torch.equal(instance, prior)
        assert both.loss_weights.tolist() == pytest.approx([0.5, 0.5, 0.35, 0.35])


def test_a_share_of_the_steps_has_the_prior_with_its_weight_divided_and_logs_its_two_parts(
    run: Run, steps: list[script.StepInputs], logged: list[dict[str, float]]
) -> None:
    run(script, *PRIOR, "--prior_share=0.25", "--prior_loss_weight=0.5", "--max_train_steps=12", "--learning_rate=1e-2")
    has_prior = [inputs.base_inputs is not None for inputs in steps]
    assert [sum(has_prior[start : start + 4]) for start in (0, 4, 8)] == [1, 1, 1] and has_prior[:8] != has_prior[4:]
    for inputs, values, wanted in zip(steps, logged, has_prior, strict=True):
        assert inputs.loss_weights.tolist() == ([1.0, 2.0] if wanted else [1.0])
        assert len(inputs.latents) == len(inputs.prompt_embeds) == len(inputs.loss_weights)
        parts = [values[name] for name in ("instance_loss", "prior_loss") if name in values]
        assert len(parts) == 2 * wanted and (not wanted or values["loss"] == pytest.approx(sum(parts), rel=1e-6))
    assert logged[has_prior.index(True, 4)]["prior_loss"] > 1e-5


def adapted_copy(base: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A copy of a model in float64, with random adapters."""
    adapted = copy.deepcopy(base).requires_grad_(False)
    args = Namespace(init_lora=None, rank=2, lora_alpha=3, lora_dropout=0.0)
    script.add_adapter(args, adapted, script.TRANSFORMER_TARGETS, Namespace(mixed_precision="no"), 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 10
    return adapted


@pytest.mark.parametrize("share", ["0.5", "0.25"])
def test_over_200_steps_the_gradient_is_that_of_the_prior_in_all_of_them(share: str, tiny_flux: Path) -> None:
    adapted = adapted_copy(FluxTransformer2DModel.from_pretrained(tiny_flux, subfolder="transformer").double())
    text = {}
    for count, name in enumerate(["own", "class"], start=1):
        step = random_step(count, False, torch.float64)
        text[name] = script.PromptEmbeds(step["prompt_embeds"][0], step["pooled_prompt_embeds"][0], torch.zeros(77))
    vae = Namespace(config=Namespace(shift_factor=0.1, scaling_factor=0.4))
    data = Namespace(prompts=text, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler())
    batch = {"keys": [script.ExampleKey(0, 0, 0, 1.0, True)], "prompts": ["own"], "loss_weights": torch.ones(1)}
    batch["posterior"] = torch.rand(1, 2, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    flags = ["--pretrained_model_name_or_path=x", "--instance_data_dir=y", "--instance_prompt=own", PRIOR[0]]

    def gradient_of(share: str, step: int) -> Tensor:
        args = script.parse_args([*flags, "--class_prompt=class", f"--prior_share={share}"])
        accelerator, state = Namespace(device=torch.device("cpu")), Namespace(seed=5, step=step)
        run: Any = Namespace(args=args, data=data, state=state, accelerator=accelerator)
        adapted.zero_grad()
        script.training_loss(adapted, script.prepare_inputs(run, batch))["loss"].backward()
        return torch.cat([weight.grad.flatten() for weight in adapted.parameters() if weight.requires_grad])

    wanted = gradient_of("1", 0)
    first = gradient_of(share, 0)
    mean = sum(gradient_of(share, step) for step in range(200)) / 200
    assert (first - wanted).norm() > 0.1 * wanted.norm() and (mean - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_and_its_gradient_are_those_of_two_models(tiny_flux: Path, masked: bool) -> None:
    """The adapted model and a copy of the base beside it, in float64; a mask weighs the subject alone."""
    base = FluxTransformer2DModel.from_pretrained(tiny_flux, subfolder="transformer", torch_dtype=torch.float64)
    adapted, generator = adapted_copy(base), torch.Generator().manual_seed(0)
    own, prior = random_step(2, False, torch.float64), random_step(3, False, torch.float64)
    class_text = script.PromptEmbeds(prior["prompt_embeds"][:2], prior["pooled_prompt_embeds"][:2], torch.zeros(2, 77))
    token_weights = torch.rand(2, 6, generator=generator) if masked else None
    inputs = script.StepInputs(
        **own, clip_ids=torch.zeros(2, 77), token_weights=token_weights,
        options=options(prior_loss_weight=0.7, prior_share=1.0),
    )  # fmt: skip
    doubled = script.add_base_prior(inputs, class_text)
    trained_clip = prior["pooled_prompt_embeds"][1:]
    doubled.pooled_prompt_embeds = torch.cat([own["pooled_prompt_embeds"], trained_clip])  # as `train` replaces it
    script.training_loss(adapted, doubled)["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in adapted.named_parameters() if parameter.requires_grad}

    adapted.zero_grad()
    kept_step = {**own, "prompt_embeds": class_text.prompt_embeds, "pooled_prompt_embeds": class_text[1]}
    prior_step = {**kept_step, "pooled_prompt_embeds": trained_clip}
    weights = torch.ones(2, 1, 6, 4) if token_weights is None else token_weights[:, None, :, None].repeat(1, 1, 1, 4)
    loss = torch.zeros(())
    for index, sigma in enumerate(own["sigmas"].tolist()):
        errors = reference_velocity(adapted, own, index, sigma) - (own["noise"] - own["latents"])[index]
        tokens = errors.reshape(16, 3, 2, 2, 2).permute(0, 1, 3, 2, 4).reshape(16, 6, 4)  # six tokens of 2 x 2
        weighed = (tokens.square() * weights[index]).sum() / weights[index].sum() / 16
        with torch.no_grad():
            kept = reference_velocity(base, kept_step, index, sigma)
        change = reference_velocity(adapted, prior_step, index, sigma) - kept
        loss = loss + own["loss_weights"][index] * (weighed + 0.7 * change.square().mean())
    loss.backward()
    assert len(found) > 10
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:  # the loss is computed in float32
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_prior_is_of_clip_as_it_was(run: Run, steps: list[script.StepInputs]) -> None:
    run(script, *PRIOR, "--train_text_encoder", "--text_encoder_lr=1e-2", "--max_train_steps=4")
    kept = [inputs.base_inputs.pooled_prompt_embeds for inputs in steps]
    trained = [inputs.pooled_prompt_embeds.chunk(2)[1] for inputs in steps]
    assert all(torch.equal(one, kept[0]) for one in kept[1:])
    torch.testing.assert_close(trained[0].detach(), kept[0], rtol=1e-4, atol=1e-5)
    assert (trained[3] - kept[0]).abs().max() > 1e-3


def test_with_a_class_word_the_prior_has_each_pictures_own_prompt(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "dogs"))
    captions = [f"a photo of sks dog {where}" for where in ("on grass", "in snow", "at sea", "beside desks")]
    for path, caption in zip(sorted(folder.iterdir()), captions, strict=False):  # the last has the instance prompt
        path.with_suffix(".txt").write_text(caption)
    prepare, seen = script.prepare_inputs, dict[str, str]()

    def record(running: script.Run, batch: dict[str, Any]) -> script.StepInputs:
        inputs, known = prepare(running, batch), running.data.prompts
        [prompt], [pooled] = batch["prompts"], inputs.base_inputs.pooled_prompt_embeds
        [seen[prompt]] = [name for name in known if torch.equal(known[name].prompt_embeds, inputs.prompt_embeds[1])]
        assert torch.equal(known[seen[prompt]].pooled_prompt_embeds, pooled)
        return inputs

    monkeypatch.setattr(script, "prepare_inputs", record)
    flags = ["--caption_extension=.txt", f"--instance_data_dir={folder}", "--max_sequence_length=77"]
    flags += ["--trigger_word=sks dog", "--class_word=a dog", "--instance_prompt=a photo of {trigger}"]
    run(script, PRIOR[0], *flags, "--max_train_steps=5")
    assert seen == {prompt: prompt.replace("sks dog", "a dog") for prompt in [*captions, "a photo of sks dog"]}
    args = Namespace(trigger_word="sks", class_word=r"a\1", class_prompt=None)
    assert script.prior_prompt(args, "sks dog beside desks") == r"a\1 dog beside desks"


def test_with_all_that_is_off_by_default_a_resumed_run_is_bit_for_bit_the_run_never_stopped(
    run: Run, pictures: Path, tmp_path: Path
) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in sorted(pictures.iterdir())[1:]:
        Image.open(path).convert("L").save(masks / f"{path.stem}.png")
    flags = (
        *PRIOR, "--train_text_encoder", f"--mask_data_dir={masks}", "--trigger_word=ohwx", "--resolution=32,64",
        "--aspect_ratio_buckets=auto", "--cache_latents", "--random_flip", "--validation_resolution=48",
        "--validation_prompt=a {trigger} dog", "--validation_loss", "--gradient_checkpointing", "--blocks_to_swap=1",
        "--base_quantization=int8", "--checkpointing_steps=2", "--lora_dropout=0.2", "--gradient_accumulation_steps=2",
        "--prior_share=0.25", "--seed=1",  # step 4 has the prior
    )  # fmt: skip
    whole = run(script, *flags, "--max_train_steps=4", f"--output_dir={tmp_path / 'whole'}")
    run(script, *flags)
    resumed = run(script, *flags, "--max_train_steps=4", "--resume_from_checkpoint=latest")
    expected, got = (load_file(folder / script.LORA_FILE) for folder in (whole, resumed))
    assert expected.keys() == got.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
