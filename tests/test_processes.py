"""Two real processes train what one process trains on larger batches, and do not do the same work twice."""

import itertools
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from conftest import SCRIPTS
from tests.processes import launch_jobs, read_records
from tests.record_run import record_run

PICTURES = 5
RANDOM_SIZES = np.exp(np.random.default_rng(0).uniform(math.log(300), math.log(900), (50, 2))).astype(int).tolist()
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
        return Trained(read_records(self.folder), self.folder / "two")

    def run(self, name: str, batch_size: int, micro_batches: int, *flags: str) -> Trained:
        """The same on one process, split otherwise."""
        split = [f"--train_batch_size={batch_size}", f"--gradient_accumulation_steps={micro_batches}"]
        argv = [*self.flags, *split, f"--output_dir={self.folder / name}", *flags]
        return Trained([record_run(self.script, argv)], self.folder / name)


FUSED = ["--fused_backward_pass", "--max_train_steps=3"]  # a step inside the backward pass shares its gradients too
BUCKETS = "--aspect_ratio_buckets=32,32;16,48;48,16"
# Stopped in the middle of an epoch of three steps, with all that a checkpoint may hold.
RESUMED = [
    "--random_flip", "--checkpointing_steps=1", "--train_text_encoder", "--text_encoder_lr=1e-3",
    "--with_prior_preservation", "--class_prompt=a pet", "--num_class_images=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty small pictures of random shapes. Read only."""
    folder = tmp_path_factory.mktemp("shapes")
    for number, (width, height) in enumerate(RANDOM_SIZES):
        Image.new("RGB", (width // 8, height // 8), (number * 5, 90, 90)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def folders(
    tiny_flux: Path, pictures: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """What two processes made, by script and job. All jobs run in one launch, one after the other."""
    home, jobs, found = tmp_path_factory.mktemp("launch"), dict[Path, dict[str, Any]](), dict[tuple[str, str], Path]()
    common = [f"--pretrained_model_name_or_path={tiny_flux}", f"--instance_data_dir={pictures}", *COMMON]

    def add(kind: str, job: str, *flags: str) -> None:
        folder = found[kind, job] = home / f"{kind}-{job}"
        given = [*common, "--train_batch_size=1", f"--output_dir={folder / 'two'}", *flags]
        jobs[folder] = {"script": SCRIPTS[kind].__name__, "flags": given}

    for kind in SCRIPTS:
        for job, (flags, micro_batches) in KINDS.items():
            add(kind, job, *flags, f"--gradient_accumulation_steps={micro_batches}")
        prior = f"--class_data_dir={tmp_path_factory.mktemp('class')}"
        for path in sorted(pictures.iterdir())[:3]:
            shutil.copy(path, prior.split("=")[1])
        add(kind, "whole", *RESUMED, prior)
        add(kind, "resumed", *RESUMED, prior, f"--resume_from_checkpoint={home / f'{kind}-whole/two/checkpoint-2'}")
        flags = [
            "--train_batch_size=3",
            "--gradient_accumulation_steps=2",
            "--num_train_epochs=1",
            "--max_train_steps=10",
        ]
        add(kind, "buckets", f"--instance_data_dir={shapes}", BUCKETS, *flags)
    add("full", "fused", *FUSED)
    launch_jobs(jobs, home)
    return found


@pytest.fixture(params=itertools.product(SCRIPTS, KINDS), ids="-".join)
def case(request: pytest.FixtureRequest, folders: dict[tuple[str, str], Path], tiny_flux: Path, pictures: Path) -> Case:
    """Each of the cases that one process trains as well, in turn."""
    kind, job = request.param
    flags, micro_batches = KINDS[job]
    common = [f"--pretrained_model_name_or_path={tiny_flux}", f"--instance_data_dir={pictures}", *COMMON]
    return Case(SCRIPTS[kind], [*common, *flags], folders[kind, job], micro_batches)


def trained_keys(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The examples that a process trained, without the fillers."""
    return [key for micro_batch in record["micro_batches"] for key in micro_batch["keys"] if key["loss_weight"] > 0]


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
        if key["loss_weight"] > 0
    ]
    assert len(set(drawn)) == len(drawn) == EXAMPLES[case.micro_batches]


def test_a_process_without_an_example_left_runs_a_filler_of_no_weight(case: Case) -> None:
    shares = [
        [key["loss_weight"] for part in record["micro_batches"] for key in part["keys"]]
        for record in case.two_processes.records
    ]
    assert [len(share) for share in shares] == [len(shares[0])] * 2  # else the processes would wait for each other
    assert 0 not in shares[0]
    assert 0 in shares[1]


@pytest.mark.parametrize("kind", list(SCRIPTS))
def test_two_processes_resume_the_run_never_stopped(kind: str, folders: dict[tuple[str, str], Path]) -> None:
    """Each process draws what it drew, and logs what it logged."""
    for whole, resumed in zip(
        read_records(folders[kind, "whole"]), read_records(folders[kind, "resumed"]), strict=True
    ):
        assert whole["processes"] == resumed["processes"] == 2
        assert len(whole["micro_batches"]) == 4 and resumed["micro_batches"] == whole["micro_batches"][2:]
        for got, expected in zip(resumed["logged"], whole["logged"][2:], strict=True):
            assert [got[name] for name in ("loss", "grad_norm")] == [expected[name] for name in ("loss", "grad_norm")]
    weights, expected = (Trained([], folders[kind, job] / "two").weights for job in ("resumed", "whole"))
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("kind", list(SCRIPTS))
def test_two_processes_train_each_picture_of_an_epoch_of_buckets_once(
    kind: str, folders: dict[tuple[str, str], Path]
) -> None:
    """They meet in steps whose micro-batches have other shapes."""
    records = read_records(folders[kind, "buckets"])
    keys = [
        key for record in records for batch in record["micro_batches"] for key in batch["keys"] if key["loss_weight"]
    ]
    assert sorted(key["example"] for key in keys if key["epoch"] == 0) == list(range(50))
    assert records[0]["weights"] == records[1]["weights"]
    assert sum(key["loss_weight"] for key in keys) == pytest.approx(len(records[0]["logged"]))


def test_a_fused_backward_pass_on_two_processes_trains_what_one_process_trains(
    folders: dict[tuple[str, str], Path], tiny_flux: Path, pictures: Path
) -> None:
    common = [f"--pretrained_model_name_or_path={tiny_flux}", f"--instance_data_dir={pictures}", *COMMON, *FUSED]
    case = Case(SCRIPTS["full"], common, folders["full", "fused"], 1)
    start = case.run("start", 1, 1, "--learning_rate=0").weights
    expected = case.run("one", 2, 1).weights
    assert (case.two_processes.weights - expected).norm() < 1e-4 * (expected - start).norm()
