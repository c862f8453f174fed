"""A folder and a checkpoint that are used again: nothing is lost or mixed, and what differs is told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout

from conftest import SCRIPTS, Run, both_scripts, one_script
from tests.test_checkpoints import EVERY, LATEST, WEIGHTS, assert_same_weights, names

pytestmark = one_script


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, float]]:
    """What was logged of each step."""
    steps: dict[int, dict[str, float]] = {}
    monkeypatch.setattr(Accelerator, "log", lambda _, values, step: steps.setdefault(step, {}).update(values))
    return steps


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """`told()`: what was said since the last time of a run that differs from the one that wrote a checkpoint."""

    def read() -> list[str]:
        messages = [text for text in caplog.messages if "Differs from" in text]
        caplog.clear()
        assert len(messages) < 2
        return messages[0].partition(": ")[2].split("; ") if messages else []

    return read


# What an earlier run left


@both_scripts
def test_a_new_run_moves_what_an_earlier_one_left_and_latest_goes_on_with_the_new(
    script: ModuleType, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = WEIGHTS[script.__name__]
    output = run(script, "--max_train_steps=4", EVERY, "--validation_prompt=a dog", "--validation_steps=4")
    left = {name: (output / name).read_bytes() for name in (weights, "README.md", "image_0.png")}
    new = ("--max_train_steps=2", "--seed=1", "--learning_rate=1e-2", "--checkpoints_total_limit=1")
    run(script, *new, EVERY)
    earlier = output / "earlier-1"
    assert f"Moved what an earlier run left to {earlier}" in caplog.text
    assert {name: (earlier / name).read_bytes() for name in left} == left
    assert names(earlier, "checkpoint-*") == {f"checkpoint-{step}" for step in (1, 2, 3, 4)}
    assert names(earlier / "validation") == {"step_000000_0.png", "step_000004_0.png"}
    assert list(script.list_checkpoints(output)) == [2] and not names(output) & {"image_0.png", "validation"}
    run(script, *new, LATEST, "--max_train_steps=3")
    assert_same_weights(script, output, run(script, *new, "--max_train_steps=3", f"--output_dir={tmp_path / 'alone'}"))
    assert not (output / "earlier-2").exists()


def test_a_run_that_goes_on_from_an_earlier_checkpoint_moves_the_later_ones(script: ModuleType, run: Run) -> None:
    output = run(script, "--max_train_steps=4", EVERY)
    run(script, "--max_train_steps=3", EVERY, "--resume_from_checkpoint=checkpoint-2")
    assert names(output / "earlier-1") == {"checkpoint-3", "checkpoint-4"}
    assert list(script.list_checkpoints(output)) == [1, 2, 3]


@pytest.mark.parametrize("place", ["other/checkpoint-2", "out/earlier-1/checkpoint-2"])
def test_a_run_that_goes_on_from_another_folder_does_not_mix_with_what_is_there(
    script: ModuleType, run: Run, tmp_path: Path, place: str
) -> None:
    run(script, "--max_train_steps=3", EVERY, f"--output_dir={tmp_path / 'other'}")
    output = run(script, "--max_train_steps=3", EVERY)
    run(script, "--max_train_steps=3", EVERY, "--seed=4")  # the one before is in earlier-1
    run(script, "--max_train_steps=3", EVERY, f"--resume_from_checkpoint={tmp_path / place}")
    assert list(script.list_checkpoints(output)) == [3]
    assert list(script.list_checkpoints(output / "earlier-2")) == [1, 2, 3]


@both_scripts
def test_a_finished_run_that_is_resumed_makes_its_result_again_without_training(
    script: ModuleType, run: Run, logged: dict[int, dict[str, float]], tmp_path: Path
) -> None:
    output = run(script, EVERY)
    logged.clear()
    kept = Path(shutil.copytree(output, tmp_path / "kept"))
    (output / WEIGHTS[script.__name__]).unlink()
    run(script, EVERY, LATEST, "--validation_prompt=a dog")
    assert_same_weights(script, output, kept)
    assert not logged and (output / "image_0.png").is_file() and not (output / "earlier-1").exists()


def test_a_checkpoint_past_the_end_is_an_error(script: ModuleType, run: Run) -> None:
    output = run(script, "--max_train_steps=3", EVERY)
    with pytest.raises(script.UsageError, match="is at step 3: raise --max_train_steps=2"):
        run(script, LATEST)
    assert list(script.list_checkpoints(output)) == [1, 2, 3]


def test_two_runs_do_not_write_to_one_folder(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, train = tmp_path / "out", script.train

    def train_while_another_one_starts(given: Any) -> None:
        with pytest.raises(Timeout):
            FileLock(output / ".lock").acquire(timeout=0)
        train(given)

    monkeypatch.setattr(script, "train", train_while_another_one_starts)
    run(script)
    writing = output / f"{script.PARTIAL}checkpoint-1"  # of the run that has the lock
    writing.mkdir()
    with FileLock(output / ".lock"), pytest.raises(script.UsageError, match="another run writes to it"):
        run(script)
    assert writing.is_dir()
    run(script)
    assert not writing.exists()


# What differs from the run that wrote the checkpoint

HARMLESS = ["--checkpointing_steps=7", "--checkpoints_total_limit=5", "--logging_dir=curves", "--hub_model_id=dog"]
TELLING = {  # flag: what the warning says
    "--learning_rate=0.5": "--learning_rate was 0.0001 and is 0.5",
    "--guidance_scale=1": "--guidance_scale was 3.5 and is 1.0",
    "--random_flip": "--random_flip was False and is True",
    "--instance_prompt=a cat": "--instance_prompt was a photo of sks dog and is a cat",
    "--resolution=64,32": "--resolution was [32] and is [64, 32]",
    "--prodigy_beta3=0": "--prodigy_beta3 was None and is 0.0",
    "--max_train_steps=3": "--max_train_steps was 2 and is 3",
}


def test_flags_that_change_the_run_are_named_in_one_warning_and_others_are_not(
    script: ModuleType, run: Run, told: Callable[[], list[str]]
) -> None:
    run(script, EVERY)
    run(script, LATEST, *HARMLESS)
    assert told() == []
    run(script, LATEST, *HARMLESS, *TELLING)
    assert set(TELLING.values()) <= set(changes := told())
    assert len(changes) == len(TELLING) + 1  # --validation_resolution follows --resolution


def test_another_seed_and_another_number_of_processes_are_told(
    script: ModuleType, run: Run, told: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    path = run(script, EVERY) / "checkpoint-2" / script.STATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": 4}))
    run(script, LATEST, "--seed=7")
    assert "--seed=7 has no effect: the run goes on with the checkpoint's 0" in caplog.text
    [change] = told()
    assert "4 processes" in change


UNFITTING = [  # the script, what the first run had, what the second says, and the flag that is named
    ("lora", [], ["--rank=8"], "--rank was 4 and is 8"),
    ("lora", ["--lora_layers=attn.to_q"], [], "--lora_layers was ['attn.to_q'] and is None"),
    ("lora", [], ["--train_text_encoder"], "--train_text_encoder was False and is True"),
    ("full", [], ["--optimizer=prodigy", "--learning_rate=1"], "--optimizer was adamw and is prodigy"),
    ("full", ["--use_8bit_adam"], [], "--optimizer was adamw8bit and is adamw"),
    (
        "full",
        ["--mixed_precision=bf16"],
        ["--mixed_precision=bf16", "--full_bf16"],
        "--full_bf16 was False and is True",
    ),
    ("full", ["--fused_backward_pass"], [], "--fused_backward_pass was True and is False"),
]


@pytest.mark.parametrize(("kind", "first", "second", "message"), UNFITTING, ids=[row[3] for row in UNFITTING])
def test_a_checkpoint_that_does_not_fit_is_an_error_before_a_model_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, kind: str, first: list[str], second: list[str], message: str
) -> None:
    script = SCRIPTS[kind]
    output = run(script, EVERY, *first)
    monkeypatch.setattr(script, "from_base", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(script.UsageError) as error:
        run(script, LATEST, *second)
    assert message in str(error.value)
    assert list(script.list_checkpoints(output)) == [1, 2]


# The optimizer goes on with the flags' settings


@pytest.mark.parametrize("flags", [(), ("--lr_scheduler=linear", "--lr_warmup_steps=0")], ids=["constant", "linear"])
@both_scripts
def test_settings_of_the_optimizer_follow_the_flags_after_a_resume(
    script: ModuleType, run: Run, logged: dict[int, dict[str, float]], flags: tuple[str, ...]
) -> None:
    before = ("--max_train_steps=4", EVERY, *flags, "--learning_rate=1e-2")
    run(script, *before)
    rates = {step: values["lr"] for step, values in logged.items()}
    after = ("--learning_rate=1e-4", "--adam_weight_decay=0.5", "--adam_beta1=0.5")
    output = run(script, *before, *after, "--resume_from_checkpoint=checkpoint-1")
    assert [logged[step]["lr"] for step in (2, 3, 4)] == pytest.approx([rates[step] / 100 for step in (2, 3, 4)])
    group = torch.load(output / "checkpoint-4" / "optimizer.bin")["param_groups"][0]
    assert (group["initial_lr"], group["weight_decay"], tuple(group["betas"])) == (1e-4, 0.5, (0.5, 0.999))


def test_so_do_those_of_an_optimizer_for_each_weight(run: Run, tmp_path: Path) -> None:
    """At a rate of 0 nothing moves, whatever the state says."""
    script = SCRIPTS["full"]
    output = run(script, "--fused_backward_pass", EVERY, "--learning_rate=1e-2")
    run(script, "--fused_backward_pass", EVERY, LATEST, "--max_train_steps=3", "--learning_rate=0")
    weights = [(output / f"checkpoint-{step}" / WEIGHTS[script.__name__]).read_bytes() for step in (1, 2, 3)]
    assert weights[0] != weights[1] == weights[2]
