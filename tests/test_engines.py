"""FSDP2 on two real processes trains, validates, checkpoints, resumes and saves what one process does."""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import train_dreambooth_flux as full
import train_dreambooth_lora_flux as lora
from conftest import Run
from tests.processes import ROOT, launch_jobs, read_records
from tests.record_run import launched_environment, record_run

# Three pictures and five examples on two processes: both are uneven. A schedule that moves, so that its place matters.
COMMON = [
    "--instance_prompt=a photo of sks dog", "--resolution=32", "--max_sequence_length=16", "--seed=0",
    "--report_to=none", "--max_train_steps=4", "--checkpointing_steps=2", "--upcast_before_saving",
    "--learning_rate=0.01", "--adam_epsilon=0.1", "--max_grad_norm=0.5", "--lr_scheduler=linear", "--lr_warmup_steps=2",
]  # fmt: skip
VALIDATION = [
    "--validation_prompt=a dog", "--num_validation_images=3", "--validation_num_inference_steps=3",
    "--validation_epochs=1", "--validation_loss",
]  # fmt: skip


def read_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def distance(first: Path, second: Path) -> float:
    """The largest difference between two folders' weights."""
    left, right = read_weights(first), read_weights(second)
    assert left.keys() == right.keys() and left
    return max((left[name] - right[name]).abs().max().item() for name in left)


def config_of(home: Path, precision: str = "no") -> str:
    """`accelerate_configs/fsdp2.yaml` for two processes, in float32 unless `precision` says otherwise."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())
    path = home / f"fsdp2-{precision}.yaml"
    path.write_text(yaml.safe_dump(config | {"num_processes": 2, "mixed_precision": precision}))
    return str(path)


@pytest.fixture(scope="module")
def base(tiny_flux: Path, pictures: Path) -> list[str]:
    return [*COMMON, f"--pretrained_model_name_or_path={tiny_flux}", f"--instance_data_dir={pictures}"]


@pytest.fixture(scope="module")
def one(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of steps of two examples."""
    folder = tmp_path_factory.mktemp("one")
    record = record_run(full, [*base, *VALIDATION, "--train_batch_size=2", f"--output_dir={folder}"])
    (folder / "0.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def shards(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What two processes make of them in one launch: all four steps, the last two of these, and two steps in bf16."""
    home, jobs = tmp_path_factory.mktemp("shards"), dict[Path, dict[str, Any]]()
    before = home / "whole" / "checkpoint-2"
    runs = {
        "whole": [*VALIDATION, "--gradient_checkpointing"],
        "resumed": [f"--resume_from_checkpoint={before}"],
        "bf16": [*VALIDATION, "--max_train_steps=2", "--validation_steps=2", "--skip_final_inference"],
    }
    for run, flags in runs.items():
        config = config_of(home, "bf16" if run == "bf16" else "no")
        flags = [*base, "--train_batch_size=1", f"--output_dir={home / run}", *flags]
        jobs[home / run] = {"script": full.__name__, "flags": flags, "config": config}
    launch_jobs(jobs, home)
    return {folder.name: folder for folder in jobs}


def logged(folder: Path, name: str) -> list[float]:
    return [values[name] for values in read_records(folder)[0]["logged"] if name in values]


def test_two_processes_train_what_one_trains(one: Path, shards: dict[str, Path]) -> None:
    folder = shards["whole"]
    assert [record["processes"] for record in read_records(folder)] == [2, 2]
    sums = [record["weights"] for record in read_records(folder)]
    assert sums[0] != sums[1]  # each has its own part
    for name in ("loss", "grad_norm", "lr"):
        assert len(logged(folder, name)) == 4
        assert logged(folder, name) == pytest.approx(logged(one, name), rel=1e-5)
    assert distance(folder, one) < 1e-5 and distance(folder / "checkpoint-2", one / "checkpoint-2") < 1e-5


def test_two_processes_validate_as_one_does(one: Path, shards: dict[str, Path]) -> None:
    assert len(logged(one, "validation_loss")) == 2
    assert logged(shards["whole"], "validation_loss") == pytest.approx(logged(one, "validation_loss"), rel=1e-5)
    for name in ("validation/step_000003_0.png", "validation/step_000003_2.png", "image_0.png", "image_2.png"):
        got, expected = (np.asarray(Image.open(path / name), dtype=int) for path in (shards["whole"], one))
        assert abs(got - expected).max() <= 1, name


def test_a_resumed_run_is_the_run_that_never_stopped(shards: dict[str, Path]) -> None:
    assert logged(shards["resumed"], "loss") == logged(shards["whole"], "loss")[2:]
    assert distance(shards["whole"], shards["resumed"]) == 0


def test_in_bf16_too_and_what_a_validation_left_gathered_is_saved_as_it_is_trained(
    base: list[str], shards: dict[str, Path], tmp_path: Path
) -> None:
    flags = ["--mixed_precision=bf16", "--max_train_steps=2", "--train_batch_size=2", f"--output_dir={tmp_path}"]
    expected = [values["loss"] for values in record_run(full, [*base, *flags])["logged"]]
    assert logged(shards["bf16"], "loss") == pytest.approx(expected, rel=1e-3)
    outside = {name: value for name, value in read_weights(shards["bf16"]).items() if "blocks" not in name}
    assert outside and all(value.dtype == torch.float32 for value in outside.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in outside.values())


@pytest.mark.parametrize(
    ("script", "engine", "instead"),
    [(lora, "FSDP", "ddp.yaml"), (lora, "DEEPSPEED", "ddp.yaml"), (full, "DEEPSPEED", "fsdp2.yaml")],
)
def test_other_engines_are_refused_in_one_line_before_anything_is_read(
    script: ModuleType, engine: str, instead: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = f"ACCELERATE_USE_{engine}"
    added = launched_environment(config_of(tmp_path)) if engine == "FSDP" else {name: "true"}
    monkeypatch.setenv(name, added[name])
    monkeypatch.setattr(script, "check_model", lambda *_: pytest.fail("the run began"))
    with pytest.raises(script.UsageError, match=rf"accelerate_configs/{instead}$") as refused:
        run(script)
    assert "\n" not in str(refused.value) and (ROOT / "accelerate_configs" / instead).is_file()


def set_up_sharding(base: list[str], *flags: str, fsdp2: bool = True, checkpointing: bool = False) -> None:
    plugin = SimpleNamespace(activation_checkpointing=checkpointing, mixed_precision_policy=None)
    accelerator = SimpleNamespace(is_fsdp2=fsdp2, state=SimpleNamespace(fsdp_plugin=plugin))
    full.set_up_sharding(full.parse_args([*base, *flags]), accelerator)


@pytest.mark.parametrize(
    "flag", ["--train_text_encoder", "--optimizer=adafactor", "--use_8bit_adam", "--fused_backward_pass", "--full_bf16"]
)
def test_what_shards_cannot_do_is_refused_by_name(flag: str, base: list[str]) -> None:
    set_up_sharding(base, "--mixed_precision=bf16")
    with pytest.raises(full.UsageError, match=f"leave out .*{flag.partition('=')[0]}"):
        set_up_sharding(base, "--mixed_precision=bf16", flag)


def test_fsdp1_and_its_own_checkpointing_which_renames_weights_are_refused(base: list[str]) -> None:
    for wrong in ({"fsdp2": False}, {"checkpointing": True}):
        with pytest.raises(full.UsageError, match="fsdp_version: 2 and fsdp_activation_checkpointing: false"):
            set_up_sharding(base, **wrong)
