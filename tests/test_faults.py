"""Runs that are killed, as by a power cut, again and again, and end with the weights of the undisturbed run.

FLUX_FAULTS is the number of kills at random moments for each script: 3 unless it is set.
"""

import json
import os
import random
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

KILLS = int(os.environ.get("FLUX_FAULTS", "3"))
STEPS = 3
HOW = ("before", "halfway", "after")


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
    calls: list[list[str]]  # name and paths
    seconds: float


@pytest.fixture(scope="module", params=list(SCRIPTS))
def undisturbed(
    request: pytest.FixtureRequest, forker: Forker, tiny_flux: Path, pictures: Path, tmp_path_factory: Any
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
    return Undisturbed(script, flags, output, **json.loads(count.read_text()))


def result_files(output: Path) -> list[str]:
    """Every name in `output`, but for the lock; a run killed before the old checkpoint went may keep that."""
    names = (str(path.relative_to(output)) for path in output.rglob("*"))
    return sorted(name for name in names if not name.startswith((f"checkpoint-{STEPS - 1}", ".lock")))


def newest_whole_step(script: ModuleType, output: Path) -> int:
    """The step that a resumed run would start from; every checkpoint that bears its final name must be whole."""
    checkpoints = script.list_checkpoints(output)
    for path in checkpoints.values():
        script.read_checkpoint(path)
    return max(checkpoints, default=0)


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


def draw_fault(generator: random.Random, undisturbed: Undisturbed) -> dict[str, Any]:
    """Two of three kills at a call that changes files, the others at some time."""
    if generator.random() < 1 / 3:
        return {"seconds": generator.uniform(0.01, undisturbed.seconds)}
    return {"call": generator.randint(1, len(undisturbed.calls)), "how": generator.choice(HOW)}


def test_a_run_that_is_killed_at_random_moments_ends_with_the_weights_of_the_undisturbed_run(
    undisturbed: Undisturbed, forker: Forker, tmp_path: Path
) -> None:
    generator, kills, rounds = random.Random(KILLS), 0, 0
    while kills < KILLS:
        rounds += 1
        attempts = Attempts(forker, undisturbed, tmp_path / f"out-{rounds}")
        while attempts.run(draw_fault(generator, undisturbed) if kills < KILLS else None):
            kills += 1
        assert_as_undisturbed(undisturbed, attempts.output)


def test_a_run_that_is_killed_in_the_final_save_ends_with_the_whole_result(
    undisturbed: Undisturbed, forker: Forker, tmp_path: Path
) -> None:
    """At calls after the last checkpoint stood: the result's files, their renames, and the card."""
    calls = undisturbed.calls
    last = max(number for number, (_, text) in enumerate(calls) if f"checkpoint-{STEPS}" in text) + 1
    places = list(range(last, len(calls)))
    for kill, place in enumerate(random.Random(KILLS).sample(places, min(len(places), max(1, KILLS // 3)))):
        attempts = Attempts(forker, undisturbed, tmp_path / f"out-{kill}")
        assert attempts.run({"call": place + 1, "how": HOW[kill % 3]})
        assert not attempts.run(None)
        assert_as_undisturbed(undisturbed, attempts.output)


def test_what_killed_runs_left_half_written_or_half_deleted_is_removed(
    undisturbed: Undisturbed, forker: Forker, tmp_path: Path
) -> None:
    attempts = Attempts(forker, undisturbed, tmp_path / "out")
    partial = f"{undisturbed.script.PARTIAL}checkpoint-"
    assert attempts.run({"name": "save_state", "in": f"{partial}2", "how": "after"})
    assert newest_whole_step(undisturbed.script, tmp_path / "out") == 1, "the old one went before the new one stood"
    assert (tmp_path / "out" / f"{partial}2").is_dir()
    assert attempts.run({"name": "rmtree", "in": f"{partial}2", "how": "halfway"})
    assert attempts.run({"name": "rmtree", "in": f"{partial}1", "how": "halfway"})  # which is pruned
    assert (tmp_path / "out" / f"{partial}1").is_dir()
    assert not attempts.run(None)
    assert_as_undisturbed(undisturbed, attempts.output)
    assert [name for name in result_files(attempts.output) if name.startswith(".")] == []
