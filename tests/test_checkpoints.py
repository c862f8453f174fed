"""Checkpoints: which are written and kept, and which is resumed."""

from pathlib import Path
from types import ModuleType

import pytest

from conftest import Run, one_script

pytestmark = one_script

WEIGHTS = {
    "train_dreambooth_flux": "transformer/diffusion_pytorch_model.safetensors",
    "train_dreambooth_lora_flux": "pytorch_lora_weights.safetensors",
}


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
    path, facts = found = script.find_checkpoint(args)
    assert path == output / "checkpoint-2" and facts["args"]["seed"] is None
    state = script.start_state(args, found)
    assert (state.step, state.seed) == (2, facts["state"]["seed"])
