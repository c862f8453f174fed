"""The memory plan counts what a run holds: weights, gradients and states to the byte, activations as a whole run."""

import collections
import functools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import train_dreambooth_flux as full
import train_dreambooth_lora_flux as lora
from conftest import Run, one_script
from tools import memory_plan
from tools.memory_plan import GIB

pytestmark = one_script

FLUX = ["--pretrained_model_name_or_path=FLUX.1-dev", "--instance_data_dir=dog", "--instance_prompt=x"]
SMALL = ["--resolution=64", "--max_sequence_length=64"]


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
    [(lora, ["--base_quantization=int8"]), (full, ["--optimizer=prodigy", "--learning_rate=1"])],
    ids=["lora-int8", "full-prodigy"],
)
def test_weights_and_states_are_those_of_a_run(
    script: ModuleType, flags: list[str], run: Run, monkeypatch: pytest.MonkeyPatch, tiny_flux: Path
) -> None:
    held = {}

    def count(run: Any) -> None:
        scales = [layer.state for layer in run.transformer.modules() if hasattr(layer, "state")]
        held["weights"] = sum(tensor.nbytes for tensor in [*run.transformer.parameters(), *scales])
        states = torch.utils._pytree.tree_leaves(run.optimizer.state_dict()["state"])
        held["states"] = sum(state.nbytes for state in states if isinstance(state, torch.Tensor) and state.numel() > 1)
        held["gradients"] = sum(parameter.nbytes for parameter in run.parameters)

    monkeypatch.setattr(script, "save_result", count)
    monkeypatch.setattr(script, "write_model_card", lambda *_: None)
    run(script, *flags)
    plan = plan_of(script, f"--pretrained_model_name_or_path={tiny_flux}", "--cache_latents", *SMALL, *flags)
    training = memory_plan.plan_stages(plan)["training"]
    assert {name: getattr(training, name) for name in held} == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize(
    ("script", "flags"), [(lora, ["--gradient_checkpointing"]), (full, [])], ids=["lora-checkpointing", "full-plain"]
)
def test_three_small_models_tell_what_a_whole_one_takes(script: ModuleType, flags: list[str]) -> None:
    plan = plan_of(script, *flags, "--train_batch_size=1", "--mixed_precision=bf16", "--resolution=256")
    sizes = {"num_attention_heads": 2, "num_layers": 4, "num_single_layers": 9, "joint_attention_dim": 64}
    with torch.device("meta"):
        config = dict(plan.models["transformer"].config) | sizes
        plan.models["transformer"] = type(plan.models["transformer"]).from_config(config)
    expected, found = memory_plan.measure(plan, 4, 9), memory_plan.measure_whole(plan)
    assert {name: part.total for name, part in found.items()} == pytest.approx(expected, rel=0.01)


def test_flux_1_dev_takes_what_is_known_of_it() -> None:
    """Figures that were computed from the model's shapes by hand; 20 of the blocks are 8 GiB."""

    known: dict = {}

    def base_of(*flags: str) -> float:
        plan = plan_of(lora, "--mixed_precision=bf16", "--cache_latents", "--gradient_checkpointing", *flags)
        plan.known = known
        training = memory_plan.plan_stages(plan)["training"]
        return (training.weights - training.gradients) / GIB

    assert base_of() == pytest.approx(22.17, rel=0.01)
    assert base_of("--base_quantization=int8") == pytest.approx(11.2, rel=0.01)
    assert base_of("--base_quantization=nf4") == pytest.approx(7.3, rel=0.01)
    assert 7 < base_of() - base_of("--blocks_to_swap=20") < 8


def test_pictures_take_memory_by_their_own_size(tiny_flux: Path) -> None:
    decoded = []
    for size in ("64", "64x128"):
        flags = [f"--pretrained_model_name_or_path={tiny_flux}", "--validation_prompt=x", *SMALL]
        stages = memory_plan.plan_stages(plan_of(lora, *flags, f"--validation_resolution={size}"))
        decoded.append([stages[name].activations for name in ("validation", "final pictures")])
    assert decoded[1] == pytest.approx([2 * value for value in decoded[0]], rel=0.05)


def test_the_command_prints_every_stage_and_whether_it_fits(
    script: ModuleType, tiny_flux: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "CARDS", {"large": 24})
    command = [str(script.__file__), *FLUX, f"--pretrained_model_name_or_path={tiny_flux}", "--validation_prompt=x"]
    memory_plan.main([*command, *SMALL])
    out = capsys.readouterr().out
    for stage in ("text encoders", "training", "validation", "final pictures"):
        assert re.search(rf"^{stage} +(\d+\.\d\d +){{4}}\d+\.\d\d$", out, re.MULTILINE)
    assert "large    fits" in out


def test_the_flags_that_it_advises_are_accepted_and_make_it_fit(
    script: ModuleType, tiny_flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [f"--pretrained_model_name_or_path={tiny_flux}", *SMALL, "--gradient_accumulation_steps=2"]
    plan = plan_of(script, *flags, "--mixed_precision=no")
    card = memory_plan.CONTEXT + 0.6 * memory_plan.peak_bytes(memory_plan.plan_stages(plan)) / GIB
    advised = memory_plan.find_remedy(plan, card)
    assert advised and memory_plan.fits(memory_plan.plan_stages(plan_of(script, *flags, *advised)), card)
    monkeypatch.setattr(memory_plan, "REMEDIES", {plan.lora: memory_plan.REMEDIES[plan.lora][:1]})
    assert memory_plan.find_remedy(plan, 0.1) is None  # nothing is advised that would not be enough


def test_what_comes_before_the_training_is_counted_by_its_own_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = collections.defaultdict(lambda: memory_plan.Part(0, 0, 0, 0))
    monkeypatch.setattr(memory_plan, "find_whole", lambda _: nothing)  # of the training

    def stages_of(*flags: str) -> dict[str, memory_plan.Stage]:
        prior = ["--with_prior_preservation", "--class_prompt=a dog", "--class_data_dir=class"]
        return memory_plan.plan_stages(plan_of(full, *prior, *flags))

    bf16 = stages_of("--mixed_precision=bf16", "--sample_batch_size=1")
    many = stages_of("--mixed_precision=bf16", "--sample_batch_size=32", "--prior_generation_precision=fp32")
    fp16 = stages_of("--mixed_precision=fp16", "--sample_batch_size=1")
    assert many["class pictures"].activations > 2 * bf16["class pictures"].activations
    assert many["class pictures"].weights == pytest.approx(2 * bf16["class pictures"].weights, rel=0.01)
    wider = (fp16["text encoders"].weights - bf16["text encoders"].weights) / GIB
    assert wider == pytest.approx(24 * 4096 * 10240 * 2 / GIB)  # transformers keeps T5's 24 `wo` in float32
