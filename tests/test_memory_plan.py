"""The memory plan counts what a run holds: weights, gradients and states to the byte, activations as a whole run."""

import functools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import train_dreambooth_flux as full
import train_dreambooth_lora_flux as lora
from conftest import SCRIPTS, Run, one_script
from tools import memory_plan

pytestmark = one_script

FLUX = [
    "--pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev",
    "--instance_data_dir=dog",
    "--instance_prompt=x",
]


def plan_of(script: ModuleType, *flags: str) -> memory_plan.Plan:
    args = script.parse_args([*FLUX, *flags])
    return memory_plan.Plan(script, args, dict(models_of(args.pretrained_model_name_or_path)))


@functools.cache
def models_of(name: str) -> dict[str, Any]:
    return memory_plan.load_models(name)[0]


def test_planning_leaves_the_scripts_as_they_were_imported(script: ModuleType) -> None:
    assert memory_plan.load_script(script.__file__ or "").parse_args is not script.parse_args
    assert sys.modules[script.__name__] is script  # else nothing of it could be pickled any more, for a loader's worker


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (lora, ["--mixed_precision=bf16"]),
        (lora, ["--base_quantization=int8"]),
        (full, []),
        (full, ["--optimizer=prodigy"]),
        (full, ["--use_8bit_adam"]),
    ],
)
def test_weights_and_states_are_those_of_a_run(
    script: ModuleType, flags: list[str], run: Run, monkeypatch: pytest.MonkeyPatch, tiny_flux: Path
) -> None:
    held: dict[str, float] = {}
    save_results = script.save_results

    def count(args: Any, accelerator: Any, trained: Any, dtype: Any) -> None:
        model, states = trained.transformer, torch.utils._pytree.tree_leaves(trained.optimizer.state_dict()["state"])
        held["weights"] = sum(p.numel() * p.itemsize for p in model.parameters())
        held["states"] = sum(s.numel() * s.itemsize for s in states if isinstance(s, Tensor) and s.numel() > 1)
        held["gradients"] = sum(p.numel() * 4 for p in trained.parameters)
        save_results(args, accelerator, trained, dtype)

    monkeypatch.setattr(script, "save_results", count)
    monkeypatch.setattr(memory_plan, "activations", lambda *_: (0.0, 0.0))  # which take seconds, and have a test below
    run(script, *flags)
    plan = plan_of(script, f"--pretrained_model_name_or_path={tiny_flux}", "--cache_latents", *flags)
    training = next(stage for stage in memory_plan.plan_stages(plan, {}) if stage.name == "training")
    assert training.weights == held["weights"]
    assert training.gradients == held["gradients"]
    assert training.states == pytest.approx(held["states"], rel=0.1)  # tables of 8-bit codes, small on a real model


@pytest.mark.parametrize(
    ("script", "flags"), [(lora, ["--gradient_checkpointing"]), (full, [])], ids=["lora-checkpointing", "full-plain"]
)
def test_activations_of_three_small_models_tell_those_of_a_whole_one(script: ModuleType, flags: list[str]) -> None:
    plan = plan_of(script, *flags, "--train_batch_size=1", "--mixed_precision=bf16", "--resolution=256")
    sizes = {"num_attention_heads": 2, "num_layers": 4, "num_single_layers": 9, "joint_attention_dim": 64}
    with torch.device("meta"):
        plan.models["transformer"] = type(plan.models["transformer"]).from_config(
            dict(plan.models["transformer"].config) | sizes
        )
    whole = memory_plan.make_trained(plan, 4, 9)
    found = memory_plan.peak_of([whole], functools.partial(memory_plan.run_step, plan, whole))
    assert memory_plan.activations(plan, {})[0] == pytest.approx(found, rel=0.01)


def test_flux_1_dev_takes_what_is_known_of_it() -> None:
    """Figures that were computed from the model's shapes by hand."""
    for flags, expected in {
        ("--mixed_precision=bf16",): 22.17,
        ("--mixed_precision=bf16", "--base_quantization=int8"): 11.2,
        ("--mixed_precision=bf16", "--base_quantization=nf4"): 7.3,
    }.items():
        plan = plan_of(lora, *flags)
        model = memory_plan.make_trained(plan, 19, 38)
        adapters = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
        assert (memory_plan.frozen_bytes(plan, model) - adapters) / memory_plan.GIB == pytest.approx(expected, rel=0.01)


def test_swapping_takes_blocks_off_the_device() -> None:
    weights = []
    for count in (0, 20):
        plan = plan_of(lora, "--mixed_precision=bf16", f"--blocks_to_swap={count}", "--gradient_checkpointing")
        weights.append(memory_plan.frozen_bytes(plan, memory_plan.make_trained(plan, 19, 38)))
    assert 5 < (weights[0] - weights[1]) / memory_plan.GIB < 8


def test_pictures_take_memory_by_their_own_size(tiny_flux: Path) -> None:
    decoded = []
    for size in ("64", "64x128"):
        flags = [f"--pretrained_model_name_or_path={tiny_flux}", "--resolution=32", "--max_sequence_length=64"]
        plan = plan_of(lora, *flags, "--validation_prompt=x", f"--validation_resolution={size}")
        stages = {stage.name: stage.activations for stage in memory_plan.plan_stages(plan, {})}
        decoded.append((stages["validation"], stages["final pictures"]))
    assert decoded[1] == pytest.approx(tuple(2 * value for value in decoded[0]), rel=0.05)


def test_the_command_prints_every_stage_and_whether_it_fits(
    script: ModuleType, tiny_flux: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "CARDS", {"large": 24})
    command = [str(script.__file__), *FLUX, f"--pretrained_model_name_or_path={tiny_flux}", "--validation_prompt=x"]
    memory_plan.main([*command, "--resolution=64", "--max_sequence_length=64"])
    out = capsys.readouterr().out
    for stage in ("text encoders", "training", "validation", "final pictures"):
        assert re.search(rf"^{stage} +(\d+\.\d\d +){{4}}\d+\.\d\d$", out, re.MULTILINE)
    assert "large    fits" in out


def test_the_flags_that_it_advises_are_accepted_and_make_it_fit(script: ModuleType, tiny_flux: Path) -> None:
    flags = [f"--pretrained_model_name_or_path={tiny_flux}", "--resolution=64", "--max_sequence_length=64"]
    plan = plan_of(script, *flags, "--cache_latents", "--gradient_accumulation_steps=2", "--mixed_precision=no")
    known: dict[tuple, tuple[float, float]] = {}
    before = memory_plan.peak_bytes(memory_plan.plan_stages(plan, known)) / memory_plan.GIB
    card = memory_plan.CONTEXT + 0.6 * before
    advised = memory_plan.find_remedy(plan, card, known)
    assert advised
    given = script.parse_args([*FLUX, *flags, "--cache_latents", "--gradient_accumulation_steps=2", *advised])
    assert memory_plan.fits(memory_plan.plan_stages(memory_plan.Plan(script, given, plan.models), {}), card)


def test_it_advises_nothing_that_would_not_be_enough(
    script: ModuleType, tiny_flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(
        script, f"--pretrained_model_name_or_path={tiny_flux}", "--resolution=64", "--max_sequence_length=64"
    )
    shortened = {kind: remedies[:1] for kind, remedies in memory_plan.REMEDIES.items()}
    monkeypatch.setattr(memory_plan, "REMEDIES", shortened)
    assert memory_plan.find_remedy(plan, 0.1, {}) is None


def test_it_says_how_few_blocks_need_to_be_recomputed(
    base_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = SCRIPTS["lora"]
    flags = [*base_flags, "--gradient_checkpointing", "--resolution=64", "--train_batch_size=64", "--cache_latents"]
    known: dict[tuple, tuple[float, float]] = {}

    def needed(count: int) -> float:
        plan = plan_of(script, *flags, f"--gradient_checkpointing_blocks={count}")
        return memory_plan.training_bytes(memory_plan.plan_stages(plan, known)) / memory_plan.GIB

    config = plan_of(script, *flags).models["transformer"].config
    blocks = config.num_layers + config.num_single_layers
    assert needed(0) > needed(1) > needed(blocks)
    monkeypatch.setattr(memory_plan, "CONTEXT", 0.0)
    monkeypatch.setattr(memory_plan, "CARDS", {"tight": needed(1) * 1.001, "large": needed(0) * 1.001})
    memory_plan.main([str(script.__file__), *flags])
    printed = capsys.readouterr().out
    assert "tight    fits; faster: --gradient_checkpointing_blocks=1\n" in printed
    assert "large    fits; faster: --gradient_checkpointing_blocks=0\n" in printed


def test_what_comes_before_the_training_is_counted_by_its_own_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "activations", lambda *_: (0.0, 0.0))  # of the training

    def stages_of(script: ModuleType, *flags: str) -> dict[str, memory_plan.Stage]:
        prior = ["--with_prior_preservation", "--class_prompt=a dog", "--class_data_dir=class"]
        return {stage.name: stage for stage in memory_plan.plan_stages(plan_of(script, *prior, *flags), {})}

    bf16 = stages_of(full, "--mixed_precision=bf16", "--sample_batch_size=1")
    many = stages_of(full, "--mixed_precision=bf16", "--sample_batch_size=32")
    assert many["class pictures"].activations > 2 * bf16["class pictures"].activations
    fp32 = stages_of(full, "--mixed_precision=bf16", "--sample_batch_size=1", "--prior_generation_precision=fp32")
    assert fp32["class pictures"].weights == pytest.approx(2 * bf16["class pictures"].weights, rel=0.01)
    fp16 = stages_of(full, "--mixed_precision=fp16", "--sample_batch_size=1")
    wider = (fp16["text encoders"].weights - bf16["text encoders"].weights) / memory_plan.GIB
    assert wider == pytest.approx(24 * 4096 * 10240 * 2 / memory_plan.GIB)  # transformers keeps T5's 24 `wo` in float32
