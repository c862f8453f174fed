"""A run that is stopped at any step and resumed is, bit for bit, the run that was never stopped."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from conftest import SCRIPTS, Run, both_scripts, one_script

STEPS = 4
CLIP = ["--train_text_encoder", "--text_encoder_lr=1e-3"]
CASES = {  # the scripts, their flags, and the step after which the run is stopped: an epoch has 2, 3 or 5
    "8-bit AdamW, CLIP, cached, accumulated, bf16": (
        "full lora", ["--use_8bit_adam", *CLIP, "--cache_latents", "--gradient_accumulation_steps=3",
                      "--mixed_precision=bf16"], 3,
    ),
    "Prodigy, CLIP, captions, workers": (
        "full lora", ["--optimizer=prodigy", "--learning_rate=1", *CLIP, "CAPTIONS", "--dataloader_num_workers=2",
                      "--train_batch_size=2"], 1,
    ),
    "AdamW, class pictures, accumulated": ("full lora", ["CLASS", "--gradient_accumulation_steps=2"], 2),
    "fp16, whose scale grows": ("full lora", ["--mixed_precision=fp16", "--train_batch_size=2"], 1),
    "the base as the prior, int8, CLIP, bf16": (
        "lora", ["--prior_from_base_model", "--class_prompt=a dog", "--base_quantization=int8", *CLIP,
                 "--mixed_precision=bf16"], 1,
    ),
    "bf16 weights, 8-bit AdamW, accumulated": (
        "full", ["--full_bf16", "--mixed_precision=bf16", "--use_8bit_adam", "--gradient_accumulation_steps=2"], 2,
    ),
    "bf16 weights, fused Adafactor, CLIP, class pictures": (
        "full", ["--full_bf16", "--mixed_precision=bf16", "--fused_backward_pass", "--optimizer=adafactor", *CLIP,
                 "CLASS"], 3,
    ),
}  # fmt: skip
ROWS = [
    pytest.param(SCRIPTS[kind], flags, stop, id=f"{kind}, {name}")
    for name, (kinds, flags, stop) in CASES.items()
    for kind in kinds.split()
]


@pytest.fixture(scope="module")
def folders(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By a word of CASES, the flags of a dataset whose pictures have captions, and of class pictures. Read only."""
    captioned = Path(shutil.copytree(pictures, tmp_path_factory.mktemp("captioned"), dirs_exist_ok=True))
    rows = [{"file_name": path.name, "text": f"dog {path.name}"} for path in sorted(captioned.iterdir())]
    (captioned / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prior = ["--with_prior_preservation", "--class_prompt=a dog", "--num_class_images=3"]
    return {
        "CAPTIONS": ["--instance_data_dir=", f"--dataset_name={captioned}", "--caption_column=text"],
        "CLASS": [*prior, f"--class_data_dir={shutil.copytree(pictures, tmp_path_factory.mktemp('class') / 'dogs')}"],
    }


@dataclass
class Record:
    """What a run logged of each step, and what it trained, at its end."""

    logged: dict[int, dict[str, float]] = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)


@pytest.fixture
def recorded(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Record]]:
    """Runs a script, and writes no result. With fp16 it has a scaler, as on a GPU, that doubles every two steps."""

    def run_recorded(script: ModuleType, *flags: str) -> Record:
        record = Record()
        make_accelerator = script.make_accelerator

        def with_scaler(args: Any) -> Accelerator:
            accelerator = make_accelerator(args)
            if args.mixed_precision == "fp16":
                accelerator.native_amp = True
                accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
            return accelerator

        def log(accelerator: Accelerator, values: dict[str, float], step: int) -> None:
            record.logged[step] = {name: value for name, value in values.items() if name != "step_time"}
            if accelerator.scaler is not None:
                record.logged[step]["scale"] = accelerator.scaler.get_scale()

        def save_result(run: Any) -> None:
            record.weights = [parameter.detach().clone() for parameter in run.parameters]

        with monkeypatch.context() as patch:
            patch.setattr(script, "make_accelerator", with_scaler)
            patch.setattr(script, "save_result", save_result)
            patch.setattr(Accelerator, "log", log)
            run(script, *flags)
        return record

    yield run_recorded


def assert_is_the_end_of(resumed: Record, whole: Record, stop: int) -> None:
    assert resumed.logged == {step: whole.logged[step] for step in range(stop + 1, STEPS + 1)}
    assert len(resumed.weights) == len(whole.weights) > 0
    assert all(torch.equal(got, wanted) for got, wanted in zip(resumed.weights, whole.weights, strict=True))


def copy_checkpoint(output: Path, step: int, folder: Path) -> list[str]:
    """The flags that resume a copy of `output`'s checkpoint of `step` in another folder."""
    shutil.copytree(output / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return [f"--output_dir={folder}", "--resume_from_checkpoint=latest"]


@pytest.mark.parametrize(("script", "given", "stop"), ROWS)
def test_a_resumed_run_repeats_every_number_and_weight_of_the_run_never_stopped(
    recorded: Callable[..., Record], folders: dict[str, list[str]], tmp_path: Path, script: ModuleType,
    given: list[str], stop: int,
) -> None:  # fmt: skip
    flags = ["--random_flip", "--lr_scheduler=cosine", "--lr_warmup_steps=2", "--weighting_scheme=logit_normal"]
    flags += ["--caption_dropout=0.3", f"--max_train_steps={STEPS}"]
    if script is SCRIPTS["lora"]:
        flags += ["--lora_dropout=0.2"]  # draws from torch's global generator
    for flag in given:
        flags += folders.get(flag, [flag])
    whole = recorded(script, *flags, "--checkpointing_steps=1")
    assert len({values["loss"] for values in whole.logged.values()}) == STEPS
    again = copy_checkpoint(tmp_path / "out", stop, tmp_path / "resumed")
    assert_is_the_end_of(recorded(script, *flags, *again), whole, stop)


@one_script
@pytest.mark.parametrize("stop", range(1, STEPS + 1))
def test_so_does_a_run_whose_schedule_keeps_its_own_state_stopped_at_any_step(
    script: ModuleType, recorded: Callable[..., Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """A script that somebody edited: CosineAnnealingLR has no lambdas, and makes each rate of the one before."""

    def get_scheduler(_: str, optimizer: torch.optim.Optimizer, **__: Any) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS + 1)

    monkeypatch.setattr(script, "get_scheduler", get_scheduler)
    flags = [f"--max_train_steps={STEPS}", "--checkpointing_steps=1", "--learning_rate=1e-2"]
    whole = recorded(script, *flags)
    assert len({values["lr"] for values in whole.logged.values()}) == STEPS
    again = copy_checkpoint(tmp_path / "out", stop, tmp_path / "resumed")
    assert_is_the_end_of(recorded(script, *flags, *again), whole, stop)


@both_scripts
def test_a_raised_number_of_steps_and_another_seed_go_on_as_the_longer_run(
    script: ModuleType, recorded: Callable[..., Record], tmp_path: Path
) -> None:
    longer = recorded(script, f"--max_train_steps={STEPS}", f"--output_dir={tmp_path / 'longer'}")
    recorded(script, "--max_train_steps=2", "--checkpointing_steps=2")
    resumed = recorded(script, f"--max_train_steps={STEPS}", "--resume_from_checkpoint=latest", "--seed=7")
    assert_is_the_end_of(resumed, longer, 2)
