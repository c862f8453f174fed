"""Two real processes train what one process trains on larger batches, and do not do the same work twice."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import SCRIPTS
from tests.record_run import record_run

ROOT = Path(__file__).parent.parent
PICTURES = 5
# As in test_accumulation: updates nearly proportional to their gradients.
COMMON = [
    "--instance_prompt=a photo of sks dog", "--resolution=32", "--max_sequence_length=16", "--seed=0",
    "--report_to=none", "--max_train_steps=4", "--checkpointing_steps=4", "--upcast_before_saving",
    "--learning_rate=0.01", "--text_encoder_lr=0.01", "--adam_epsilon=0.1", "--max_grad_norm=0",
]  # fmt: skip
# Each script as it is, and with two micro-batches a step, cached latents, CLIP trained and averaged weights.
KINDS: dict[str, tuple[list[str], int]] = {
    "plain": ([], 1),
    "accumulated": (["--cache_latents", "--train_text_encoder", "--use_ema"], 2),
}
EXAMPLES = {1: 2 + 2 + 1 + 2, 2: 4 + 1 + 4 + 1}  # in four steps on two processes, by micro-batches of a step


@dataclass
class Trained:
    """What a run recorded, by rank, and what it left."""

    records: list[dict[str, Any]]
    folder: Path

    @property
    def weights(self) -> Tensor:
        """All weights that were saved, LoRA or whole models, one after the other."""
        files = [*self.folder.glob("*.safetensors"), *self.folder.glob("transformer/*.safetensors")]
        files += self.folder.glob("text_encoder/*.safetensors")
        states = [load_file(file) for file in sorted(files)]
        return torch.cat([state[name].double().flatten() for state in states for name in sorted(state)])


@dataclass
class Case:
    """A script and flags, with which it was run on two processes."""

    script: ModuleType
    flags: list[str]
    folder: Path
    micro_batches: int

    @property
    def two_processes(self) -> Trained:
        return Trained(
            [json.loads((self.folder / f"{rank}.json").read_text()) for rank in range(2)], self.folder / "two"
        )

    def argv(self, name: str, batch_size: int, micro_batches: int, *flags: str) -> list[str]:
        split = [f"--train_batch_size={batch_size}", f"--gradient_accumulation_steps={micro_batches}"]
        return [*self.flags, *split, f"--output_dir={self.folder / name}", *flags]

    def run(self, name: str, batch_size: int, micro_batches: int, *flags: str) -> Trained:
        """The same on one process, split otherwise."""
        argv = self.argv(name, batch_size, micro_batches, *flags)
        return Trained([record_run(self.script, argv)], self.folder / name)


@pytest.fixture(scope="module")
def cases(tiny_flux: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Case]:
    """All cases, run on two processes by one launch: starting takes longer than training."""
    found, common = {}, [f"--pretrained_model_name_or_path={tiny_flux}", f"--instance_data_dir={pictures}", *COMMON]
    for (name, script), (kind, (flags, micro_batches)) in itertools.product(SCRIPTS.items(), KINDS.items()):
        folder = tmp_path_factory.mktemp(f"{name}-{kind}")
        found[name, kind] = Case(script, [*common, *flags], folder, micro_batches)
    home = tmp_path_factory.mktemp("launch")
    jobs = {
        str(case.folder): [case.script.__name__, *case.argv("two", 1, case.micro_batches)] for case in found.values()
    }
    (home / "jobs.json").write_text(json.dumps(jobs))
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
        str(ROOT / "tests" / "record_run.py"), str(home / "jobs.json"),
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(home)}
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return found


@pytest.fixture(params=itertools.product(SCRIPTS, KINDS), ids="-".join)
def case(request: pytest.FixtureRequest, cases: dict[tuple[str, str], Case]) -> Case:
    """Each case in turn."""
    return cases[request.param]


def trained_keys(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The examples that a process trained, without the fillers."""
    return [key for micro_batch in record["micro_batches"] for key in micro_batch["keys"] if key["weight"] > 0]


def test_there_really_were_two_processes(case: Case) -> None:
    assert [record["processes"] for record in case.two_processes.records] == [2, 2]
    states = (case.two_processes.folder / "checkpoint-4").glob("random_states_*.pkl")  # one a process
    assert len(list(states)) == 2


def test_two_processes_train_what_one_trains_on_larger_batches_or_with_more_micro_batches(case: Case) -> None:
    start = case.run("start", 1, 1, "--learning_rate=0", "--text_encoder_lr=0").weights
    got, examples = case.two_processes.weights, 2 * case.micro_batches
    for name, batch_size in (("larger batches", examples), ("more micro-batches", 1)):
        expected = case.run(name, batch_size, examples // batch_size).weights
        assert (got - expected).norm() < 1e-5 * (expected - start).norm(), name


def test_two_processes_log_what_one_logs(case: Case) -> None:
    [single] = case.run("single", 2 * case.micro_batches, 1).records
    got = case.two_processes.records[0]["logged"]
    assert len(got) == len(single["logged"]) == 4
    for values, expected in zip(got, single["logged"], strict=True):
        assert values["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert values["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_only_one_process_reads_the_transformer(case: Case) -> None:
    assert [record["reads"] for record in case.two_processes.records] == [1, 0]


def test_both_processes_end_with_the_same_weights(case: Case) -> None:
    first, second = (record["weights"] for record in case.two_processes.records)
    assert first == second


def test_the_processes_share_the_examples_of_an_epoch_and_train_each_once(case: Case) -> None:
    first, second = (
        [key for key in trained_keys(record) if key["epoch"] == 0] for record in case.two_processes.records
    )
    assert sorted(key["example"] for key in first + second) == list(range(PICTURES))
    assert sorted(key["position"] for key in first + second) == list(range(PICTURES))
    assert min(len(first), len(second)) == PICTURES // 2


@pytest.mark.parametrize("name", ["noise", "sigmas", "latents"])
def test_the_processes_draw_differently(case: Case, name: str) -> None:
    drawn = [
        value
        for record in case.two_processes.records
        for micro_batch in record["micro_batches"]
        for value, key in zip(micro_batch[name], micro_batch["keys"], strict=True)
        if key["weight"] > 0
    ]
    assert len(set(drawn)) == len(drawn) == EXAMPLES[case.micro_batches]


def test_a_process_without_an_example_left_runs_a_filler_of_no_weight(case: Case) -> None:
    shares = [
        [key["weight"] for part in record["micro_batches"] for key in part["keys"]]
        for record in case.two_processes.records
    ]
    assert [len(share) for share in shares] == [len(shares[0])] * 2  # else the processes would wait for each other
    assert 0 not in shares[0]
    assert 0 in shares[1]
