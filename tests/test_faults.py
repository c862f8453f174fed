"""Runs that are killed, as by a power cut, again and again, and end with the weights of the undisturbed run.

FLUX_FAULTS is the number of kills for each script: 4 unless it is set.
"""

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import SCRIPTS
from tests.faulty_run import Forker

KILLS = int(os.environ.get("FLUX_FAULTS", "4"))
STEPS = 3


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    forker = Forker(tmp_path_factory.mktemp("forker"))
    yield forker
    forker.close()


@dataclass
class Undisturbed:
    """A run of a script that nothing disturbed: what it left, the calls that changed files, and how long it took."""

    script: ModuleType
    flags: list[str]
    output: Path
    calls: list[tuple[str, str]]


@pytest.fixture(scope="module", params=list(SCRIPTS))
def undisturbed(
    request: pytest.FixtureRequest,
    forker: Forker,
    tiny_flux: Path,
    pictures: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Undisturbed:
    script, folder = SCRIPTS[request.param], tmp_path_factory.mktemp("undisturbed")
    flags = [
        f"--pretrained_model_name_or_path={tiny_flux}", f"--instance_data_dir={pictures}", "--resolution=32",
        "--instance_prompt=a photo of sks dog", "--train_batch_size=1", f"--max_train_steps={STEPS}", "--seed=0",
        "--checkpointing_steps=1", "--checkpoints_total_limit=1", "--max_sequence_length=16", "--report_to=none",
        "--resume_from_checkpoint=latest", "--hub_model_id=sks-dog",
    ]  # fmt: skip
    output, count = folder / "out", folder / "calls.json"
    pid, log = forker.start(script.__name__, [*flags, f"--output_dir={output}"], {"count": str(count)})
    assert forker.wait(pid) == 0, log.read_text()[-3000:]
    return Undisturbed(script, flags, output, json.loads(count.read_text()))


def result_files(output: Path) -> list[str]:
    """Every name in `output`; a run killed before the old checkpoint went may keep it, if it saves none any more.

    Not the lock, which a process takes away as it ends; a fork of `Forker` ends without that.
    """
    names = (str(path.relative_to(output)) for path in output.rglob("*"))
    return sorted(name for name in names if not name.startswith((f"checkpoint-{STEPS - 1}", ".flux.lock")))


def newest_whole_step(script: ModuleType, output: Path) -> int:
    """The step that a resumed run would start from; every checkpoint that bears its final name must be whole."""
    steps = [0]
    for step, path in script.list_checkpoints(output).items():
        script.read_checkpoint(path)
        steps.append(step)
    return max(steps)


def assert_as_undisturbed(undisturbed: Undisturbed, output: Path) -> None:
    assert result_files(output) == result_files(undisturbed.output)
    for file in undisturbed.output.rglob("*.safetensors"):  # of the result and of the checkpoint
        got, expected = load_file(output / file.relative_to(undisturbed.output)), load_file(file)
        assert got.keys() == expected.keys(), file
        assert [name for name in expected if not torch.equal(got[name], expected[name])] == [], file


@dataclass
class Attempts:
    """A run in a folder of its own, attempted until it ends by itself."""

    forker: Forker
    undisturbed: Undisturbed
    output: Path

    def run(self, fault: dict[str, Any] | None) -> bool:
        """Attempt it once, resuming; says whether it was killed. What was saved before is never lost."""
        script = self.undisturbed.script
        before = newest_whole_step(script, self.output)
        argv = [*self.undisturbed.flags, f"--output_dir={self.output}"]
        pid, log = self.forker.start(script.__name__, argv, fault)
        code = self.forker.wait(pid)
        assert code in (0, -signal.SIGKILL), (fault, log.read_text()[-3000:])
        assert newest_whole_step(script, self.output) >= before, fault
        return code != 0


def draw_fault(generator: random.Random, calls: int) -> dict[str, Any]:
    """Two of three kills at a call that changes files, the others at some time."""
    if generator.random() < 1 / 3:
        return {"seconds": generator.uniform(0.01, 2)}
    return {"call": generator.randint(1, calls), "how": generator.choice(("before", "halfway", "after"))}


def test_a_run_that_is_killed_at_random_moments_ends_with_the_weights_of_the_undisturbed_run(
    undisturbed: Undisturbed, forker: Forker, tmp_path: Path
) -> None:
    generator, kills, rounds = random.Random(KILLS), 0, 0
    while kills < KILLS:
        rounds += 1
        attempts = Attempts(forker, undisturbed, tmp_path / f"out-{rounds}")
        killed, survived = True, []
        while killed:
            fault = draw_fault(generator, len(undisturbed.calls)) if kills < KILLS else None
            killed = attempts.run(fault)
            kills += killed
            survived.append(fault)
        assert_as_undisturbed(undisturbed, attempts.output)
        shutil.rmtree(attempts.output)
    assert kills == KILLS


def test_a_run_that_is_killed_in_the_final_save_ends_with_the_whole_result(
    undisturbed: Undisturbed, forker: Forker, tmp_path: Path
) -> None:
    """At calls after the last checkpoint stood: the result's files, their renames, and the card."""
    calls = undisturbed.calls
    last = max(at for at, (name, text) in enumerate(calls) if f"checkpoint-{STEPS}" in text) + 1
    places = [at for at in range(last, len(calls)) if calls[at][0] != "fsync"]
    assert len(places) >= 3
    for number, at in enumerate(random.Random(KILLS).sample(places, min(len(places), max(2, KILLS // 2)))):
        attempts = Attempts(forker, undisturbed, tmp_path / f"out-{number}")
        assert attempts.run({"call": at + 1, "how": ("before", "halfway", "after")[number % 3]})
        assert not attempts.run(None)
        assert_as_undisturbed(undisturbed, attempts.output)


def test_a_run_that_is_killed_while_it_removes_leftovers_removes_them_the_next_time(
    undisturbed: Undisturbed, forker: Forker, tmp_path: Path
) -> None:
    attempts = Attempts(forker, undisturbed, tmp_path / "out")
    assert attempts.run({"name": "save_state", "in": "checkpoint-2", "how": "after"})
    assert newest_whole_step(undisturbed.script, tmp_path / "out") == 1, "the old one went before the new one stood"
    old = tmp_path / "out" / ".checkpoint-1.flux-old"
    shutil.copytree(tmp_path / "out" / "checkpoint-1", old)
    assert (tmp_path / "out" / ".checkpoint-2.flux-partial").is_dir()
    for leftover in (".checkpoint-1.flux-old", ".checkpoint-2.flux-partial"):
        assert attempts.run({"name": "rmtree", "in": leftover, "how": "halfway"})
    assert not attempts.run(None)
    assert_as_undisturbed(undisturbed, attempts.output)


def test_a_checkpoint_that_was_being_replaced_when_the_run_was_killed_is_resumed(
    undisturbed: Undisturbed, forker: Forker, tmp_path: Path
) -> None:
    """Between the two renames, only the old one is there, under another name."""
    output = tmp_path / "out"
    shutil.copytree(undisturbed.output / f"checkpoint-{STEPS}", output / f".checkpoint-{STEPS}.flux-old")
    pid, log = forker.start(undisturbed.script.__name__, [*undisturbed.flags, f"--output_dir={output}"], {})
    assert forker.wait(pid) == 0
    assert f"at step {STEPS} of {STEPS}" in log.read_text()
    assert_as_undisturbed(undisturbed, output)


def test_killed_runs_leave_no_name_of_something_half_done(undisturbed: Undisturbed) -> None:
    names = result_files(undisturbed.output)
    assert f"checkpoint-{STEPS}" in names and "checkpoint-1" not in names
    assert [name for name in names if name.endswith((".flux-partial", ".flux-old"))] == []
