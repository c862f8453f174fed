"""Checkpoints of earlier versions go on, and a flag that is added later changes nothing of what is there."""

import json
import shutil
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train_dreambooth_lora_flux as lora
from conftest import Run, one_script

HERE = Path(__file__).parent
WRITTEN = HERE / "checkpoint_761c0ed"  # by the LoRA script of that revision, with these flags
FLAGS = [
    "--pretrained_model_name_or_path=tiny-flux", "--instance_data_dir=pictures", "--checkpointing_steps=2",
    "--validation_prompt=a dog", "--skip_final_inference", "--rank=1", "--lora_alpha=2", "--lora_layers=attn.to_q",
]  # fmt: skip
EVERY, LATEST = "--checkpointing_steps=1", "--resume_from_checkpoint=latest"


def test_a_checkpoint_of_an_earlier_version_goes_on_as_the_run_that_never_stopped(
    run: Run, tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("tiny-flux").symlink_to(tiny_flux)
    Path("pictures").symlink_to(pictures)
    shutil.copytree(WRITTEN, "out")
    resumed = run(lora, *FLAGS, "--output_dir=out", "--max_train_steps=4", LATEST)
    assert "with everything" in caplog.text and "Differs from" not in caplog.text
    whole = run(lora, *FLAGS, "--output_dir=whole", "--max_train_steps=4")
    expected, got = (load_file(folder / "checkpoint-4" / lora.LORA_FILE) for folder in (whole, resumed))
    before = load_file(WRITTEN / "checkpoint-2" / lora.LORA_FILE)
    assert expected.keys() == got.keys() == before.keys() and len(got) > 2
    for name in expected:  # written on another machine, whose sums may be rounded otherwise
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(got[name], before[name]) for name in got)


def add_flag(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *declaration: Any) -> None:
    """What somebody does who adds a flag: a line in FLAGS."""
    flag = script.Flag(*declaration)
    groups = script.FLAG_GROUPS | {"training": [*script.FLAG_GROUPS["training"], flag]}
    monkeypatch.setattr(script, "FLAG_GROUPS", groups)
    monkeypatch.setattr(script, "FLAG_OF", script.FLAG_OF | {flag.dest: flag})


@one_script
def test_after_a_flag_was_added_a_finished_run_has_still_nothing_to_do(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(script, EVERY)
    add_flag(monkeypatch, script, "--huber_delta", float, 0.5, "where the loss becomes linear")
    monkeypatch.setattr(script, "encode_prompts", lambda *_: pytest.fail("a model was loaded"))
    run(script, EVERY, LATEST)
    assert "Nothing to do" in caplog.text


@one_script
def test_a_flag_that_a_checkpoint_does_not_know_counts_as_its_default(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(script, EVERY, "--max_train_steps=1")
    add_flag(monkeypatch, script, "--huber_delta", float, 0.5, "where the loss becomes linear")
    run(script, EVERY, LATEST, "--huber_delta=0.5", "--max_train_steps=2")
    assert "Differs from" not in caplog.text
    run(script, EVERY, LATEST, "--huber_delta=2", "--max_train_steps=3")
    assert "--huber_delta was 0.5 and is 2.0" in caplog.text


@one_script
def test_a_flag_that_is_gone_is_not_missed(script: ModuleType, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    path = run(script, EVERY, "--max_train_steps=1") / "checkpoint-1" / script.STATE_FILE
    content = json.loads(path.read_text())
    content["facts"]["args"]["save_kohya_format"] = True
    content["facts"]["state"]["losses"] = [1.0]
    content["checksum"] = zlib.crc32(json.dumps([content["files"], content["facts"]]).encode())
    path.write_text(json.dumps(content))
    run(script, EVERY, LATEST)
    assert "Resuming from" in caplog.text and "Differs from" not in caplog.text
