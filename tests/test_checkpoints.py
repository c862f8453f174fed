"""Checkpoints: which are written and kept, which is resumed, and that a resumed run is the run never stopped."""

import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from conftest import Run

WEIGHTS = {
    "train_dreambooth_flux": "transformer/diffusion_pytorch_model.safetensors",
    "train_dreambooth_lora_flux": "pytorch_lora_weights.safetensors",
}
PRIOR = ("--with_prior_preservation", "--class_prompt=a dog", "--num_class_images=2", "--sample_batch_size=2")


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Loss by step of what runs in this process; a resumed run overwrites what it repeats."""
    logged: dict[int, float] = {}
    monkeypatch.setattr(Accelerator, "log", lambda _, values, step: logged.__setitem__(step, values["loss"]))
    return logged


@pytest.mark.parametrize(
    "flags",
    [
        ("--train_text_encoder", "--text_encoder_lr=1e-3"),
        ("--optimizer=prodigy", "--learning_rate=1", *PRIOR),
        ("--use_8bit_adam", "--cache_latents", "--mixed_precision=bf16", "--random_flip"),
        ("--gradient_accumulation_steps=3", "--dataloader_num_workers=1", "--lr_scheduler=cosine"),
    ],
    ids=["clip", "prodigy-prior", "8bit-cached-bf16", "accumulated-workers-cosine"],
)
def test_a_resumed_run_equals_the_run_never_stopped(
    script: ModuleType, run: Run, losses: dict[int, float], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """Stopped in the middle of an epoch; weights bit for bit, and every loss."""
    common = [*flags, "--max_train_steps=5", "--checkpointing_steps=2", "--lr_warmup_steps=1", "--random_flip"]
    common.append(f"--class_data_dir={tmp_path / 'class'}")
    whole = run(script, *common)
    expected, whole_losses = load_file(whole / WEIGHTS[script.__name__]), dict(losses)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    shutil.copytree(whole / "checkpoint-2", stopped / "checkpoint-2")
    losses.clear()
    run(script, *common, f"--output_dir={stopped}", "--resume_from_checkpoint=latest")
    assert losses == {step: loss for step, loss in whole_losses.items() if step > 2}
    weights = load_file(stopped / WEIGHTS[script.__name__])
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_checkpoint_is_found_as_latest_by_name_and_by_path(script: ModuleType, run: Run, tmp_path: Path) -> None:
    output = run(script, "--max_train_steps=4", "--checkpointing_steps=2")
    base = ["--pretrained_model_name_or_path=x", "--instance_prompt=x", "--instance_data_dir=x"]
    for given, step in (("latest", 4), ("checkpoint-2", 2), (str(output / "checkpoint-2"), 2)):
        args = script.parse_args([*base, f"--output_dir={output}", f"--resume_from_checkpoint={given}"])
        found, facts = script.find_checkpoint(args)
        assert found == output / f"checkpoint-{step}" and facts["state"]["step"] == step


def test_a_checkpoint_that_does_not_exist_is_an_error_that_lists_those_that_do(script: ModuleType, run: Run) -> None:
    run(script, "--checkpointing_steps=1")
    with pytest.raises(script.UsageError, match=r"'checkpoint-9'.* has checkpoint-1, checkpoint-2"):
        run(script, "--resume_from_checkpoint=checkpoint-9")


def test_latest_in_an_empty_folder_starts_anew(script: ModuleType, run: Run, losses: dict[int, float]) -> None:
    run(script, "--resume_from_checkpoint=latest")
    assert list(losses) == [1, 2]


def test_the_limit_keeps_the_newest_and_what_is_not_ours(script: ModuleType, run: Run, tmp_path: Path) -> None:
    notes = tmp_path / "out" / "checkpoint-notes"
    notes.mkdir(parents=True)
    (notes / "notes.txt").write_text("mine")
    output = run(script, "--max_train_steps=4", "--checkpointing_steps=1", "--checkpoints_total_limit=2")
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-4",
        "checkpoint-notes",
    ]
    assert (notes / "notes.txt").read_text() == "mine"


def test_a_half_written_checkpoint_is_not_the_latest(
    script: ModuleType, run: Run, base_flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    output = run(script, "--checkpointing_steps=1")
    (output / "checkpoint-2" / script.STATE_FILE).unlink()
    assert script.find_checkpoint(script.parse_args([*base_flags, "--resume_from_checkpoint=latest"]))[0] == (
        output / "checkpoint-1"
    )
    assert "checkpoint-2 is not whole" in caplog.text


def test_without_a_seed_one_is_drawn_and_a_resumed_run_keeps_it(
    script: ModuleType, run: Run, base_flags: list[str]
) -> None:
    base_flags.remove("--seed=0")
    output = run(script, "--checkpointing_steps=1")
    args = script.parse_args([*base_flags, "--resume_from_checkpoint=latest"])
    path, facts = script.find_checkpoint(args)
    assert path == output / "checkpoint-2" and facts["args"]["seed"] is None
    state = script.start_state(args, (path, facts))
    assert (state.step, state.seed) == (2, facts["state"]["seed"])
