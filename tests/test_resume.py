"""A run stopped at any step and resumed is, bit for bit, the run never stopped: a table of runs, and what it says."""

import itertools
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from conftest import SCRIPTS, Run, both_scripts, one_script
from tests.test_checkpoints import WEIGHTS

pytestmark = one_script

ROOT = Path(__file__).parent.parent
STEPS = 4


class Row(NamedTuple):
    """A run, and the step after which it is stopped: in the middle of an epoch of two or three steps."""

    optimizer: str
    data: str
    cached: bool
    workers: int
    accumulation: int
    precision: str
    stop: int


LEVELS: dict[str, tuple[Any, ...]] = {
    "optimizer": ("AdamW", "8-bit AdamW", "Prodigy"),
    "data": ("captions", "prior", "clip"),
    "cached": (False, True),
    "workers": (0, 2),
    "accumulation": (1, 3),
    "precision": ("no", "bf16"),
}
TABLE = [  # every two levels of two factors meet in some row
    Row("8-bit AdamW", "captions", True, 2, 1, "no", 1),
    Row("8-bit AdamW", "clip", True, 0, 3, "bf16", 3),
    Row("8-bit AdamW", "prior", False, 2, 3, "no", 1),
    Row("AdamW", "captions", True, 0, 3, "bf16", 1),
    Row("AdamW", "clip", False, 2, 3, "no", 3),
    Row("AdamW", "prior", True, 0, 1, "no", 2),
    Row("Prodigy", "captions", False, 0, 3, "no", 3),
    Row("Prodigy", "clip", True, 2, 1, "bf16", 1),
    Row("Prodigy", "prior", False, 0, 1, "bf16", 2),
    Row("AdamW", "captions prior clip", False, 2, 1, "bf16", 2),
]
OPTIMIZERS = {"AdamW": [], "8-bit AdamW": ["--use_8bit_adam"], "Prodigy": ["--optimizer=prodigy", "--learning_rate=1"]}


def name(row: Row) -> str:
    parts = [row.optimizer, row.data, "cached" if row.cached else "uncached", f"{row.workers} workers"]
    return ", ".join([*parts, f"accumulation {row.accumulation}", row.precision])


@pytest.fixture(scope="module")
def captioned(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local dataset: the pictures, each with a caption of its own. Read only."""
    folder = tmp_path_factory.mktemp("captioned")
    files = sorted(pictures.iterdir())
    for file in files:
        shutil.copy(file, folder)
    rows = [{"file_name": file.name, "text": f"a photo of sks dog, number {at}"} for at, file in enumerate(files)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def class_pictures(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class pictures, so that none is generated. Read only."""
    folder = tmp_path_factory.mktemp("class")
    for file in sorted(pictures.iterdir())[:3]:
        shutil.copy(file, folder)
    return folder


def flags_of(row: Row, script: ModuleType, captioned: Path, class_pictures: Path) -> list[str]:
    flags = [*OPTIMIZERS[row.optimizer], f"--dataloader_num_workers={row.workers}", "--random_flip"]
    flags += [f"--gradient_accumulation_steps={row.accumulation}", f"--mixed_precision={row.precision}"]
    flags += [f"--train_batch_size={2 if row.accumulation == 1 else 1}", f"--max_train_steps={STEPS}"]
    flags += ["--lr_scheduler=cosine", "--lr_warmup_steps=1", "--weighting_scheme=logit_normal"]
    if "lora" in script.__name__:
        flags += ["--lora_dropout=0.2"]  # draws from torch's global generator
    if row.cached:
        flags += ["--cache_latents"]
    if "captions" in row.data:
        flags += ["--instance_data_dir=", f"--dataset_name={captioned}", "--caption_column=text"]
    if "prior" in row.data:
        flags += ["--with_prior_preservation", "--class_prompt=a dog", f"--class_data_dir={class_pictures}"]
        flags += ["--num_class_images=3"]
    if "clip" in row.data:
        flags += ["--train_text_encoder", "--text_encoder_lr=1e-3"]
    return flags


@dataclass
class Record:
    """What a run did, by step: its examples, every input of its loss, what it logged; and its weights at the end."""

    keys: dict[int, list[Any]] = field(default_factory=dict)
    inputs: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    logged: dict[int, dict[str, float]] = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)


def copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


@pytest.fixture
def record(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Record:
    """Records the runs of this process; `record.__init__()` starts anew. The result is not written."""
    seen = Record()
    prepare_inputs = script.prepare_inputs

    def record_inputs(run: Any, batch: dict[str, Any], sigma_table: Tensor) -> Any:
        inputs = prepare_inputs(run, batch, sigma_table)
        seen.keys.setdefault(run.state.step + 1, []).append(batch["keys"])
        seen.inputs.setdefault(run.state.step + 1, []).append(
            {key: copied(value) for key, value in vars(inputs).items() if key != "options"}
        )
        return inputs

    def record_values(_: Accelerator, values: dict[str, float], step: int) -> None:
        seen.logged[step] = {key: values[key] for key in ("loss", "lr", "grad_norm", "prodigy_d") if key in values}

    def record_weights(_: object, __: object, trained: Any, ___: object) -> None:
        seen.weights = [copied(parameter) for parameter in trained.parameters]

    monkeypatch.setattr(script, "prepare_inputs", record_inputs)
    monkeypatch.setattr(script, "save_results", record_weights)
    monkeypatch.setattr(Accelerator, "log", record_values)
    return seen


def stopped_at(output: Path, step: int, folder: Path) -> list[str]:
    """The flags that resume a copy of `output`'s checkpoint of `step` in another folder."""
    shutil.copytree(output / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return [f"--output_dir={folder}", "--resume_from_checkpoint=latest"]


def test_every_two_levels_of_two_factors_meet_in_the_table() -> None:
    for (one, levels), (other, more) in itertools.combinations(LEVELS.items(), 2):
        met = {(getattr(row, one), getattr(row, other)) for row in TABLE}
        assert met >= set(itertools.product(levels, more)), (one, other)


@pytest.mark.parametrize("row", TABLE, ids=name)
@both_scripts
def test_a_resumed_run_repeats_every_input_loss_and_weight_of_the_run_never_stopped(
    script: ModuleType, run: Run, record: Record, captioned: Path, class_pictures: Path, tmp_path: Path, row: Row
) -> None:
    flags = flags_of(row, script, captioned, class_pictures)
    whole_output = run(script, *flags, "--checkpointing_steps=1")
    whole = Record(**vars(record))
    assert list(whole.keys) == list(whole.logged) == [1, 2, 3, 4]
    assert sum(key.epoch for parts in whole.keys.values() for part in parts for key in part) > 0, "one epoch only"
    vars(record).update(vars(Record()))
    run(script, *flags, *stopped_at(whole_output, row.stop, tmp_path / "resumed"))
    left = range(row.stop + 1, STEPS + 1)
    assert record.keys == {step: whole.keys[step] for step in left}
    for step in left:
        for got, expected in zip(record.inputs[step], whole.inputs[step], strict=True):
            assert [key for key in expected if not same(got[key], expected[key])] == [], step
    assert record.logged == {step: whole.logged[step] for step in left}
    assert len(record.weights) == len(whole.weights) > 0
    assert all(torch.equal(got, expected) for got, expected in zip(record.weights, whole.weights, strict=True))


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.name != ".flux.lock")  # which goes with the process
    stats = {str(path.relative_to(folder)): path.stat() for path in files}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


@pytest.mark.parametrize("every", [1, 2], ids=["a checkpoint at the end", "the last checkpoint before the end"])
def test_a_finished_run_does_nothing_when_resumed_and_says_so(
    script: ModuleType, run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    flags = ("--max_train_steps=3", f"--checkpointing_steps={every}")
    output = run(script, *flags)
    before = tree(output)
    monkeypatch.setattr(script, "encode_prompts", lambda *_: pytest.fail("a model was loaded"))
    caplog.clear()
    run(script, *flags, "--resume_from_checkpoint=latest")
    assert "Nothing to do: all 3 steps are done; raise --max_train_steps to go on" in caplog.messages
    assert tree(output) == before


def test_a_raised_number_of_steps_goes_on_as_the_longer_run(script: ModuleType, run: Run, tmp_path: Path) -> None:
    longer = run(script, "--max_train_steps=4", f"--output_dir={tmp_path / 'longer'}")
    run(script, "--max_train_steps=2", "--checkpointing_steps=2")
    output = run(script, "--max_train_steps=4", "--resume_from_checkpoint=latest")
    weights, expected = (load_file(folder / WEIGHTS[script.__name__]) for folder in (output, longer))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)


def test_the_result_of_a_shorter_run_is_not_taken_for_that_of_the_longer_one(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longer one was ended between its last checkpoint and its result."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    longer = run(script, "--max_train_steps=3", f"--output_dir={tmp_path / 'longer'}")
    run(script, "--max_train_steps=2", "--checkpointing_steps=1")
    flags = ("--max_train_steps=3", "--checkpointing_steps=1", "--resume_from_checkpoint=latest")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "save_results", end)
        run(script, *flags)
    output = run(script, *flags)
    weights, expected = (load_file(folder / WEIGHTS[script.__name__]) for folder in (output, longer))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


# What the command lines say differently

HARMLESS = [
    "--max_train_steps=2", "--checkpointing_steps=7", "--checkpoints_total_limit=5", "--dataloader_num_workers=1",
    "--num_validation_images=2", "--validation_epochs=3", "--logging_dir=curves", "--upcast_before_saving",
    "--num_train_epochs=2",
]  # fmt: skip
TELLING = {  # flag: what the warning says
    "--learning_rate=0.5": "--learning_rate was 0.0001 and is 0.5",
    "--guidance_scale=1": "--guidance_scale was 3.5 and is 1.0",
    "--random_flip": "--random_flip was False and is True",
    "--center_crop": "--center_crop was False and is True",
    "--weighting_scheme=mode": "--weighting_scheme was 'none' and is 'mode'",
    "--gradient_accumulation_steps=2": "--gradient_accumulation_steps was 1 and is 2",
    "--instance_prompt=a cat": "--instance_prompt was 'a photo of sks dog' and is 'a cat'",
    "--mixed_precision=bf16": "precision was 'no' and is 'bf16'",
}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_changes_that_change_nothing_are_not_named(
    script: ModuleType, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run(script, "--max_train_steps=1", "--checkpointing_steps=1")
    caplog.clear()
    run(script, "--resume_from_checkpoint=latest", *HARMLESS)
    assert any("Resuming from" in message for message in caplog.messages)
    assert warnings_of(caplog) == []


def test_every_change_that_changes_the_run_is_named_in_a_warning(
    script: ModuleType, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run(script, "--max_train_steps=1", "--checkpointing_steps=1")
    caplog.clear()
    run(script, "--resume_from_checkpoint=latest", *HARMLESS, *TELLING)
    [message] = [
        message for message in warnings_of(caplog) if "Differs from the run that wrote checkpoint-1" in message
    ]
    *named, consequence = message.split(": ", 1)[1].split("; ")
    assert consequence == "results will not match an uninterrupted run"
    assert set(TELLING.values()) <= set(named)
    assert {line.split(" was ")[0] for line in named} == {
        *(line.split(" was ")[0] for line in TELLING.values()),
        "--mixed_precision",  # the flag, beside what accelerate made of it
        "training pictures",  # the prompt, beside the flag
    }


def test_other_pictures_are_named_in_a_warning(
    script: ModuleType, run: Run, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One more in the same folder: the command lines are the same."""
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    run(script, "--max_train_steps=1", "--checkpointing_steps=1", f"--instance_data_dir={folder}")
    shutil.copy(next(folder.iterdir()), folder / "another.png")
    caplog.clear()
    run(script, "--resume_from_checkpoint=latest", f"--instance_data_dir={folder}")
    told, moved = warnings_of(caplog)
    assert told.split(": ", 1)[1].startswith("training pictures was '5 (") and "Moved what an earlier run left" in moved


def test_more_steps_of_a_schedule_that_depends_on_them_are_named(
    script: ModuleType, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    cosine = ("--lr_scheduler=cosine", "--lr_warmup_steps=0")
    run(script, "--max_train_steps=1", "--checkpointing_steps=1", *cosine)
    caplog.clear()
    run(script, "--resume_from_checkpoint=latest", *cosine)
    warning, moved = warnings_of(caplog)
    assert "max_train_steps was 1 and is 2" in warning and "Moved what an earlier run left" in moved


def test_another_seed_is_said_to_have_no_effect_and_has_none(
    script: ModuleType, run: Run, record: Record, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = run(script, "--checkpointing_steps=1")
    logged = dict(record.logged)
    run(script, *stopped_at(output, 1, tmp_path / "resumed"), "--seed=7")
    assert record.logged == logged
    assert any("--seed=7 has no effect" in message for message in warnings_of(caplog))


INCOMPATIBLE = [  # what the first run had, and what the second says
    ("lora", [], ["--rank=8"], "rank"),
    ("lora", [], ["--lora_layers=attn.to_q"], "lora_layers"),
    ("lora", [], ["--train_text_encoder"], "train_text_encoder"),
    ("lora", ["--train_text_encoder"], [], "train_text_encoder"),
    ("full", [], ["--train_text_encoder"], "train_text_encoder"),
    ("full", ["--train_text_encoder"], [], "train_text_encoder"),
    ("full", [], ["--optimizer=prodigy", "--learning_rate=1"], "optimizer"),
    ("full", ["--use_8bit_adam"], [], "use_8bit_adam"),
]


@pytest.mark.parametrize(("kind", "first", "second", "flag"), INCOMPATIBLE, ids=lambda value: str(value))
def test_a_checkpoint_that_does_not_fit_the_flags_is_a_usage_error_that_names_the_flag(
    run: Run, kind: str, first: list[str], second: list[str], flag: str
) -> None:
    script = SCRIPTS[kind]
    run(script, "--max_train_steps=1", "--checkpointing_steps=1", *first)
    with pytest.raises(script.UsageError, match=f"--{flag}|{flag} was"):
        run(script, "--resume_from_checkpoint=latest", *second)


def test_latest_in_an_empty_folder_says_that_the_run_starts_anew(
    script: ModuleType, run: Run, record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    output = run(script, "--resume_from_checkpoint=latest", "--max_train_steps=1")
    assert f"--resume_from_checkpoint=latest: no checkpoint in {output}, so this run starts anew" in caplog.messages
    assert list(record.logged) == [1]
