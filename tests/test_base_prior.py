"""`--prior_from_base_model`: the target of the class prompt is what the model without adapters predicts."""

import copy
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import train_dreambooth_lora_flux as script
from conftest import Run

PRIOR = ("--prior_from_base_model", "--class_prompt=a photo of a dog")
WORDS = ("--trigger_word=sks dog", "--class_word=a dog")


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, script.StepInputs]]:
    """Losses of the pictures, (2B,), and inputs of each micro-batch of the training."""
    seen: list[tuple[Tensor, script.StepInputs]] = []
    whole, of_each = script.training_loss, script.flow_matching_loss

    def remember(*args: Any) -> Tensor:
        losses: Tensor = of_each(*args)
        current.append(losses.detach())
        return losses

    def record(transformer: Any, inputs: script.StepInputs) -> Tensor:
        loss = whole(transformer, inputs)
        seen.append((current.pop(), inputs))
        return loss

    current: list[Tensor] = []
    monkeypatch.setattr(script, "flow_matching_loss", remember)
    monkeypatch.setattr(script, "training_loss", record)
    return seen


@pytest.mark.parametrize(
    "more",
    [[], ["--train_text_encoder"], ["--base_quantization=nf4"], ["--blocks_to_swap=2", "--gradient_checkpointing"]],
    ids=["plain", "CLIP", "nf4", "swapped"],
)
def test_with_fresh_adapters_the_prior_is_zero_and_then_it_is_not(
    run: Run, losses: list[tuple[Tensor, script.StepInputs]], more: list[str]
) -> None:
    run(script, *PRIOR, *more, "--max_train_steps=3", "--learning_rate=1e-2", "--text_encoder_lr=1e-2")
    first, *_, last = [found for found, _ in losses]
    assert first[0] > 0.1 and first[1] < 1e-12
    assert last[1] > 1e-6


def test_the_class_prompt_sees_the_same_noisy_pictures(
    run: Run, losses: list[tuple[Tensor, script.StepInputs]]
) -> None:
    run(script, *PRIOR, "--train_batch_size=2", "--cache_latents", "--random_flip")
    run(script, "--train_batch_size=2", "--cache_latents", "--random_flip")
    for (_, both), (_, plain) in zip(losses[:2], losses[2:], strict=True):
        for name in ("latents", "noise", "sigmas"):
            halves = getattr(both, name).chunk(2)
            assert torch.equal(halves[0], halves[1]) and torch.equal(halves[0], getattr(plain, name)), name
        assert torch.equal(both.prompt_embeds.chunk(2)[0], plain.prompt_embeds)
        assert not torch.equal(*both.prompt_embeds.chunk(2))


def test_the_loss_and_its_gradient_are_those_of_two_models(tiny_flux: Path) -> None:
    """The adapted model and a copy of the base beside it, in float64."""
    base = FluxTransformer2DModel.from_pretrained(tiny_flux, subfolder="transformer", torch_dtype=torch.float64)
    adapted = copy.deepcopy(base).requires_grad_(False)
    flags = ["--pretrained_model_name_or_path=x", "--instance_data_dir=y", "--instance_prompt=z", *PRIOR]
    args = script.parse_args([*flags, "--prior_loss_weight=0.7"])
    script.add_adapter(args, adapted, script.TRANSFORMER_TARGETS, 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 10
    config: Any = base.config

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    latents, noise, sigmas = draw(2, 16, 4, 4), draw(2, 16, 4, 4), torch.tensor([0.3, 0.8], dtype=torch.float64)
    text, pooled = draw(4, 6, config.joint_attention_dim), draw(4, config.pooled_projection_dim)
    base_pooled, guidance = draw(2, config.pooled_projection_dim), torch.ones(4, dtype=torch.float64)
    twice = [torch.cat([part, part]) for part in (latents, noise, sigmas)]
    weights = torch.tensor([0.5, 0.5, 0.35, 0.35], dtype=torch.float64)
    inputs = script.StepInputs(*twice, text, pooled, guidance, weights, args, None, base_pooled)
    script.training_loss(adapted, inputs).backward()
    found = {name: parameter.grad.clone() for name, parameter in adapted.named_parameters() if parameter.requires_grad}

    adapted.zero_grad()
    noisy = (1 - sigmas.view(-1, 1, 1, 1)) * latents + sigmas.view(-1, 1, 1, 1) * noise
    with torch.no_grad():
        kept = script.predict_velocity(base, noisy, sigmas, text[2:], base_pooled, guidance[2:])
    own = script.predict_velocity(adapted, noisy, sigmas, text[:2], pooled[:2], guidance[:2])
    prior = script.predict_velocity(adapted, noisy, sigmas, text[2:], pooled[2:], guidance[2:])
    loss = (own - script.pack_latents(noise - latents)).square().mean() + 0.7 * (prior - kept).square().mean()
    loss.backward()
    assert len(found) > 10
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:  # the loss is computed in float32
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_the_prior_is_of_clip_as_it_was(run: Run, losses: list[tuple[Tensor, script.StepInputs]]) -> None:
    run(script, *PRIOR, "--train_text_encoder", "--text_encoder_lr=1e-2", "--max_train_steps=4")
    kept = [inputs.base_pooled for _, inputs in losses]
    trained = [inputs.pooled_prompt_embeds.chunk(2)[1] for _, inputs in losses]
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

    def record(of: script.Run, batch: dict[str, Any], table: Tensor) -> script.StepInputs:
        inputs = prepare(of, batch, table)
        kept, pooled = inputs.prompt_embeds.chunk(2)[1], inputs.base_pooled
        assert pooled is not None
        for prompt, embeds, base in zip(batch["prompts"], kept, pooled, strict=True):
            known = of.data.prompts.items()
            [seen[prompt]] = [name for name, one in known if torch.equal(one.prompt_embeds, embeds)]
            assert torch.equal(of.data.prompts[seen[prompt]].pooled_prompt_embeds, base)
        return inputs

    monkeypatch.setattr(script, "prepare_inputs", record)
    flags = ["--caption_extension=.txt", f"--instance_data_dir={folder}", "--max_sequence_length=77"]
    run(script, PRIOR[0], *WORDS, *flags, "--instance_prompt=a photo of {trigger}", "--max_train_steps=5")
    expected = [*captions, "a photo of sks dog"]
    assert seen == {prompt: prompt.replace("sks dog", "a dog") for prompt in expected}
    args = Namespace(trigger_word="sks", class_word=r"a\1", class_prompt=None)
    assert script.prior_prompt(args, "sks dog beside desks") == r"a\1 dog beside desks"


def test_a_mask_weighs_the_subject_alone() -> None:
    batch = {"keys": [SimpleNamespace(epoch=0, position=0)], "prompts": ["a"], "loss_weights": torch.ones(1)}
    batch |= {"latents": [torch.zeros(1, 16, 4, 4)] * 2, "token_weights": torch.tensor([[0.1, 1.0, 0.1, 1.0]])}
    args = Namespace(
        prior_loss_weight=1.0,
        prior_from_base_model=True, class_prompt="b", class_word=None, flow_shift=None, weighting_scheme="none",
        logit_mean=0.0, logit_std=1.0, mode_scale=1.0, guidance_scale=1.0,
    )  # fmt: skip
    embeds = {name: script.PromptEmbeds(torch.zeros(3, 8), torch.zeros(8), torch.zeros(77)) for name in "ab"}
    data = SimpleNamespace(
        prompts=embeds, scheduler_config=None, vae_config=SimpleNamespace(shift_factor=0.0, scaling_factor=1.0)
    )
    trained = SimpleNamespace(
        text_encoder=None, transformer=SimpleNamespace(config=SimpleNamespace(guidance_embeds=False))
    )
    state = SimpleNamespace(seed=0)
    made = SimpleNamespace(args=args, data=data, state=state, accelerator=Accelerator(), trained=trained)
    inputs = script.prepare_inputs(made, batch, torch.linspace(1, 0.001, 1000))
    assert inputs.token_weights is not None
    assert inputs.token_weights.tolist() == [pytest.approx([0.1, 1.0, 0.1, 1.0]), [1.0] * 4]


def test_what_the_class_prompt_draws_stays_nearer_to_the_base(run: Run, tmp_path: Path) -> None:
    """The change of the velocity of the class prompt after a training with and without the term."""
    flags = ("--learning_rate=1e-2", "--max_train_steps=12", "--rank=8", "--lora_alpha=8")
    seen = script.training_loss
    changes = []
    for name, more in (("with", [*PRIOR, "--prior_loss_weight=5"]), ("without", [*PRIOR, "--prior_loss_weight=0"])):
        found: list[float] = []

        def record(transformer: Any, inputs: script.StepInputs, found: list[float] = found) -> Tensor:
            with torch.no_grad():
                noisy = script.add_noise(inputs.latents, inputs.noise, inputs.sigmas)
                text = (inputs.prompt_embeds, inputs.pooled_prompt_embeds)
                own = script.predict_velocity(transformer, noisy, inputs.sigmas, *text, inputs.guidance).chunk(2)[1]
                found.append(
                    (own - script.predict_base_velocity(transformer, noisy, inputs, inputs.base_pooled))
                    .square()
                    .mean()
                    .item()
                )
            return seen(transformer, inputs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "training_loss", record)
            run(script, *flags, *more, f"--output_dir={tmp_path / name}")
        changes.append(sum(found[-4:]))
    assert changes[0] < 0.5 * changes[1]


def test_with_all_that_is_off_by_default_a_resumed_run_is_bit_for_bit_the_run_never_stopped(
    run: Run, pictures: Path, tmp_path: Path
) -> None:
    first = run(script, "--train_text_encoder", f"--output_dir={tmp_path / 'first'}")
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in sorted(pictures.iterdir())[1:]:
        Image.open(path).convert("L").save(masks / f"{path.stem}.png")
    flags = (
        *PRIOR, "--train_text_encoder", f"--init_lora={first}", f"--mask_data_dir={masks}", "--trigger_word=ohwx",
        "--resolution=32,64", "--aspect_ratio_buckets=auto", "--cache_latents", "--cached_views=3", "--random_flip",
        "--validation_resolution=48", "--validation_prompt=a {trigger} dog", "--validation_loss", "--use_ema",
        "--gradient_checkpointing", "--gradient_checkpointing_blocks=1", "--checkpointing_steps=2",
        "--lora_dropout=0.2", "--gradient_accumulation_steps=2",
    )  # fmt: skip
    whole = run(script, *flags, "--max_train_steps=4", f"--output_dir={tmp_path / 'whole'}")
    run(script, *flags)
    resumed = run(script, *flags, "--max_train_steps=4", "--resume_from_checkpoint=latest")
    expected, got = (load_file(folder / script.LORA_FILE) for folder in (whole, resumed))
    assert expected.keys() == got.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


def test_it_is_one_kind_of_prior_or_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--pretrained_model_name_or_path=x", "--instance_data_dir=y", "--instance_prompt=z"]
    for flags, words in (
        ([PRIOR[0]], "--prior_from_base_model needs --class_prompt"),
        ([*PRIOR, "--with_prior_preservation", "--class_data_dir=c"], "instead of --with_prior_preservation"),
        ([*PRIOR, *WORDS], "--class_word is instead of --class_prompt"),
        ([PRIOR[0], *WORDS], "--instance_prompt lacks; write {trigger}"),
        ([PRIOR[0], WORDS[1]], "--class_word needs --trigger_word"),
    ):
        with pytest.raises(SystemExit):
            script.parse_args([*base, *flags])
        assert words in capsys.readouterr().err
    assert script.notes_on_args(script.parse_args([*base, *PRIOR])) == []
    (note,) = script.notes_on_args(script.parse_args([*base, *PRIOR, "--class_data_dir=c"]))
    assert "--class_data_dir has no effect with --prior_from_base_model" in note
