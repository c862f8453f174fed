"""Checkpoints: which are written and kept, which is whole and resumed, and that Windows can do it too."""

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import SCRIPTS, Run, both_scripts, one_script

pytestmark = one_script

WEIGHTS = {
    "train_dreambooth_flux": "transformer/diffusion_pytorch_model.safetensors",
    "train_dreambooth_lora_flux": "pytorch_lora_weights.safetensors",
}
EVERY, LATEST = "--checkpointing_steps=1", "--resume_from_checkpoint=latest"


def find(script: ModuleType, output: Path, wanted: str = "latest") -> Path | None:
    flags = ["--pretrained_model_name_or_path=x", "--instance_prompt=a dog", "--instance_data_dir=y"]
    args = script.parse_args([*flags, f"--output_dir={output}", f"--resume_from_checkpoint={wanted}"])
    return script.find_checkpoint(args)


def names(folder: Path, pattern: str = "*") -> set[str]:
    return {path.name for path in folder.glob(pattern)}


def assert_same_weights(script: ModuleType, output: Path, expected_output: Path) -> None:
    got, expected = (load_file(folder / WEIGHTS[script.__name__]) for folder in (output, expected_output))
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def load_anew(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as an interpreter that has just started has it."""
    spec = importlib.util.spec_from_file_location(f"{script.__name__}_anew", str(script.__file__))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-2", "{}/out/checkpoint-2", "moved/from/checkpoint-2"])
def test_a_checkpoint_is_found_as_latest_by_name_and_by_path(
    script: ModuleType, run: Run, tmp_path: Path, wanted: str
) -> None:
    output = run(script, "--max_train_steps=3" if wanted != "latest" else "--max_train_steps=2", EVERY)
    assert find(script, output, wanted.format(tmp_path)) == output / "checkpoint-2"


def test_the_limit_keeps_the_newest_and_what_only_has_a_similar_name(script: ModuleType, run: Run) -> None:
    output = run(script, EVERY)
    others = {"checkpoint-1-good", "checkpoint-notes", "checkpoint-002", "my-checkpoint-1"}
    for other in others:
        shutil.copytree(output / "checkpoint-1", output / other)
    run(script, "--max_train_steps=5", EVERY, "--checkpoints_total_limit=2", LATEST)
    assert names(output, "*checkpoint-*") == {"checkpoint-4", "checkpoint-5", *others}
    run(script, EVERY)
    assert names(output, "*checkpoint-*") == {"checkpoint-1", "checkpoint-2", *others}


@both_scripts
def test_a_checkpoint_says_its_state_and_every_file_that_it_has(script: ModuleType, run: Run) -> None:
    checkpoint = run(script, EVERY, "--hub_token=hf_secret", "--repeats=3") / "checkpoint-2"
    text = (checkpoint / script.STATE_FILE).read_text()
    content = json.loads(text)
    others = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in checkpoint.rglob("*.*")}
    del others[script.STATE_FILE]
    assert content["files"] == others
    assert {"optimizer.bin", "random_states_0.pkl", WEIGHTS[script.__name__]} <= others.keys()
    assert (content["state"]["step"], content["state"]["seed"], content["processes"]) == (2, 0, 1)
    assert content["args"]["repeats"] == 3 and "hf_secret" not in text


def test_without_a_seed_one_is_drawn_and_a_resumed_run_keeps_it(
    script: ModuleType, run: Run, base_flags: list[str]
) -> None:
    base_flags.remove("--seed=0")
    run(script, EVERY)
    output = run(script, EVERY, LATEST, "--max_train_steps=3")
    seeds = [script.read_checkpoint(path)["state"]["seed"] for path in script.list_checkpoints(output).values()]
    assert len(seeds) == 3 and len(set(seeds)) == 1
    again = run(script, EVERY, f"--output_dir={output}-again")
    assert script.read_checkpoint(again / "checkpoint-1")["state"]["seed"] != seeds[0]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-3]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
@both_scripts
def test_latest_passes_over_a_checkpoint_that_is_not_whole_and_says_so(
    script: ModuleType, run: Run, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    """Whichever file is damaged. One that is named is an error, and without another one the run starts anew."""
    output = run(script, EVERY)
    files = [path for path in (output / "checkpoint-2").rglob("*") if path.is_file()]
    assert len(files) > 3
    for file in files:
        content = file.read_bytes()
        damage(file)
        caplog.clear()
        assert find(script, output) == output / "checkpoint-1"
        [warning] = [record.getMessage() for record in caplog.records]
        assert str(output / "checkpoint-2") in warning and "no whole checkpoint" in warning
        with pytest.raises(script.UsageError, match="checkpoint-2 is no whole checkpoint"):
            find(script, output, "checkpoint-2")
        (output / "checkpoint-1").rename(output / "elsewhere")
        assert find(script, output) is None
        assert "so this run starts anew" in caplog.messages[-1]
        (output / "elsewhere").rename(output / "checkpoint-1")
        file.write_bytes(content)
    assert find(script, output) == output / "checkpoint-2"


@both_scripts
def test_a_run_resumed_beside_a_damaged_checkpoint_ends_as_the_undisturbed_run(
    script: ModuleType, run: Run, tmp_path: Path
) -> None:
    whole = run(script, f"--output_dir={tmp_path / 'whole'}")
    output = run(script, EVERY)
    (output / "checkpoint-2" / "optimizer.bin").unlink()
    run(script, EVERY, LATEST)
    assert_same_weights(script, output, whole)
    assert find(script, output) == output / "checkpoint-2", "the damaged checkpoint was not replaced"
    assert names(output / "earlier-1") == {"checkpoint-2"} and not names(output, f"{script.PARTIAL}*")


@both_scripts
def test_a_checkpoint_of_the_other_script_is_refused(script: ModuleType, run: Run) -> None:
    [other] = (module for module in SCRIPTS.values() if module is not script)
    output = run(other, EVERY)
    for wanted in ("checkpoint-2", "latest"):
        with pytest.raises(script.UsageError, match="checkpoint-2 does not fit this run"):
            find(script, output, wanted)


class WindowsOs(ModuleType):
    """`os` where no folder can be opened."""

    name = "nt"

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    @staticmethod
    def open(path: Path, flags: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return os.open(path, flags)


@both_scripts
def test_windows_trains_and_resumes_without_signals_of_unix_and_flushed_folders(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(script, f"--output_dir={tmp_path / 'whole'}")
    relative_to = pathlib.PurePath.relative_to
    backslashes = lambda *given: pathlib.PureWindowsPath(relative_to(*given))  # noqa: E731
    monkeypatch.setattr(pathlib.PurePath, "relative_to", backslashes)
    for name in ("SIGHUP", "SIGUSR1"):
        monkeypatch.delattr(signal, name)
    windows = load_anew(script, monkeypatch)
    monkeypatch.setattr(windows, "os", WindowsOs("os"))
    run(windows, EVERY, "--max_train_steps=1")
    output = run(windows, EVERY, LATEST)
    assert_same_weights(script, output, whole)
    files = script.read_checkpoint(output / "checkpoint-2")["files"]
    assert "optimizer.bin" in files and not any("\\" in name for name in files)
