"""Two real processes train what one process trains on larger batches, and what they share they share once."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import SCRIPTS
from tests.processes import launch_jobs, read_records
from tests.record_run import record_run

PICTURES, CLASS_PICTURES = 5, 3
# As in test_accumulation: updates nearly proportional to their gradients.
COMMON = [
    "--instance_prompt=a photo of sks dog", "--resolution=32", "--max_sequence_length=16", "--seed=0",
    "--report_to=none", "--max_train_steps=4", "--checkpointing_steps=4", "--upcast_before_saving",
    "--learning_rate=0.01", "--text_encoder_lr=0.01", "--adam_epsilon=0.1", "--max_grad_norm=0",
]  # fmt: skip
# Two micro-batches a step, cached latents, CLIP, class pictures that are missing, and all of validation.
MUCH = [
    "--cache_latents", "--train_text_encoder", "--with_prior_preservation", "--class_prompt=a pet",
    f"--num_class_images={CLASS_PICTURES}", "--sample_batch_size=1", "--validation_loss", "--validation_epochs=1",
    "--validation_prompt=a dog", "--num_validation_images=1", "--validation_num_inference_steps=1",
]  # fmt: skip
CASES: dict[str, tuple[str, list[str], int]] = {  # script, flags, micro-batches of a step
    "lora": ("lora", [], 1),
    "lora, much": ("lora", MUCH, 2),
    # The base as the prior is nothing before the first update, and little after small ones; steps 2 and 4 have it.
    "lora, base prior": (
        "lora",
        ["--prior_from_base_model", "--class_prompt=a pet", "--prior_loss_weight=50", "--prior_share=0.5"],
        1,
    ),
    "full": ("full", [], 1),
    "full, much": ("full", MUCH, 2),
    "full, fused": ("full", ["--fused_backward_pass"], 1),  # a step inside the backward pass shares its gradients too
}
EXAMPLES = {1: 2 + 2 + 1 + 2, 2: 4 + 1 + 4 + 1}  # in four steps on two processes, by micro-batches of a step
# Stopped in the middle of an epoch of three steps, of which some have pictures of other sizes on each process.
RESUMED = [
    "--random_flip", "--checkpointing_steps=1", "--train_text_encoder", "--aspect_ratio_buckets=32,32;32,48;48,32",
]  # fmt: skip


@dataclass
class Trained:
    records: list[dict[str, Any]]  # by rank
    folder: Path

    @property
    def weights(self) -> Tensor:
        """All weights that were saved, LoRA or whole models, one after the other."""
        patterns = ("*.safetensors", "transformer/*.safetensors", "text_encoder/*.safetensors")
        states = [load_file(file) for pattern in patterns for file in sorted(self.folder.glob(pattern))]
        return torch.cat([state[name].double().flatten() for state in states for name in sorted(state)])


@pytest.fixture(scope="module")
def common(tiny_flux: Path, pictures: Path) -> list[str]:
    return [f"--pretrained_model_name_or_path={tiny_flux}", f"--instance_data_dir={pictures}", *COMMON]


@pytest.fixture(scope="module")
def pairs(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """What two processes made, by case; and of each script whole and resumed. One launch runs one after the other."""
    home, jobs = tmp_path_factory.mktemp("launch"), dict[Path, dict[str, Any]]()

    def add(job: str, kind: str, *flags: str) -> None:
        given = [*common, "--train_batch_size=1", f"--output_dir={home / job / 'out'}", *flags]
        jobs[home / job] = {"script": SCRIPTS[kind].__name__, "flags": given}

    for case, (kind, flags, micro_batches) in CASES.items():
        split = f"--gradient_accumulation_steps={micro_batches}"
        add(case, kind, *flags, split, f"--class_data_dir={home / case / 'class'}")
    for kind in SCRIPTS:
        add(f"{kind}, whole", kind, *RESUMED)
        before = home / f"{kind}, whole" / "out" / "checkpoint-2"
        add(f"{kind}, resumed", kind, *RESUMED, f"--resume_from_checkpoint={before}")
    launch_jobs(jobs, home)
    return {folder.name: Trained(read_records(folder), folder / "out") for folder in jobs}


@pytest.fixture(scope="module")
def singles(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Trained]]:
    """What one process makes of each case: before a step, on larger batches, and with more micro-batches."""
    found: dict[str, dict[str, Trained]] = defaultdict(dict)
    start = ["--learning_rate=0", "--text_encoder_lr=0", "--max_train_steps=1"]
    for case, (kind, flags, micro_batches) in CASES.items():
        home, count = tmp_path_factory.mktemp("one"), 2 * micro_batches
        ways = {"start": (1, 1, start), "larger batches": (count, 1, []), "more micro-batches": (1, count, [])}
        if "fused" in case:  # which takes one micro-batch a step
            ways.pop("more micro-batches")
        for way, (size, number, extra) in ways.items():
            split = [f"--train_batch_size={size}", f"--gradient_accumulation_steps={number}"]
            argv = [*common, *flags, *split, f"--class_data_dir={home / 'class'}", f"--output_dir={home / way}", *extra]
            found[case][way] = Trained([record_run(SCRIPTS[kind], argv)], home / way)
    return found


def tolerance(case: str) -> float:
    """The base's prior here is 100 times a difference of velocities that are nearly equal."""
    return 2e-4 if "prior" in case else 1e-5


def micro_batches_of(pair: Trained, **wanted: int) -> list[dict[str, Any]]:
    """Those of both processes that train something, without the fillers."""
    parts = [part for record in pair.records for part in record["micro_batches"] if part["keys"][0]["loss_weight"] > 0]
    return [part for part in parts if all(part["keys"][0][name] == value for name, value in wanted.items())]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_and_log_what_one_does_on_larger_batches_or_with_more_micro_batches(
    case: str, pairs: dict[str, Trained], singles: dict[str, dict[str, Trained]]
) -> None:
    pair, single = pairs[case], dict(singles[case])
    assert [record["processes"] for record in pair.records] == [2, 2]
    assert pair.records[0]["weights"] == pair.records[1]["weights"]
    start, logged = single.pop("start").weights, pair.records[0]["logged"]
    assert len([values for values in logged if "loss" in values]) == 4
    for way, trained in single.items():
        assert (pair.weights - trained.weights).norm() < tolerance(case) * (trained.weights - start).norm(), way
        for values, wanted in zip(logged, trained.records[0]["logged"], strict=True):
            names = wanted.keys() - {"lr", "step_time"}
            got = {name: values[name] for name in names}
            assert got == pytest.approx({name: wanted[name] for name in names}, rel=tolerance(case)), way


def test_the_prior_counts_in_what_two_processes_are_compared_with(pairs: dict[str, Trained]) -> None:
    logged, plain = (pairs[case].records[0]["logged"] for case in ("lora, base prior", "lora"))
    assert ["prior_loss" in values for values in logged] == [False, True, False, True]
    assert abs(logged[3]["loss"] / plain[3]["loss"] - 1) > 1e-3


@pytest.mark.parametrize("case", ["lora", "lora, much", "full, much", "full, fused"])
def test_a_number_of_some_micro_batches_of_one_process_is_summed_over_those_alone(
    case: str, pairs: dict[str, Trained]
) -> None:
    expected: list[dict[str, float]] = [{"loss": 0}]
    for first, second in zip(*(record["micro_batches"] for record in pairs[case].records), strict=True):
        expected[-1]["loss"] += first["loss"] + second["loss"]
        if second["keys"][0]["position"] % 2:
            expected[-1]["odd"] = expected[-1].get("odd", 0) + 2 * second["loss"]
        if second["keys"][0]["last"]:
            expected.append({"loss": 0})
    logged = [values for values in pairs[case].records[0]["logged"] if "loss" in values]
    assert 0 < sum("odd" in values for values in expected) < 4
    for values, wanted in zip(logged, expected[:-1], strict=True):
        assert {name: values[name] for name in ("loss", "odd") if name in values} == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("case", ["lora", "full, much"])
def test_the_processes_train_each_example_of_an_epoch_once_and_draw_differently(
    case: str, pairs: dict[str, Trained]
) -> None:
    epoch = [part["keys"][0] for part in micro_batches_of(pairs[case], epoch=0)]
    for name in ("example", "position"):
        assert sorted(key[name] for key in epoch) == list(range(PICTURES))
    for name in ("noise", "sigmas", "latents"):
        drawn = [tuple(part[name]) for part in micro_batches_of(pairs[case])]
        assert len(set(drawn)) == len(drawn) == EXAMPLES[CASES[case][2]], name
    first, second = ([part["keys"][0]["loss_weight"] for part in record["micro_batches"]]
                     for record in pairs[case].records)  # fmt: skip
    assert len(first) == len(second) and 0 not in first and 0 in second  # fillers: else one would wait for the other


@pytest.mark.parametrize("kind", list(SCRIPTS))
def test_class_pictures_are_shared_out_and_all_else_is_done_by_each_or_by_the_first(
    kind: str, pairs: dict[str, Trained], singles: dict[str, dict[str, Trained]]
) -> None:
    pair, single = pairs[f"{kind}, much"], singles[f"{kind}, much"]["start"]
    files = sorted((pair.folder.parent / "class").iterdir())
    assert len(files) == CLASS_PICTURES
    for file in files:
        assert file.read_bytes() == (single.folder.parent / "class" / file.name).read_bytes()
    prompts, pixels = 1 + 3, 2 * PICTURES + CLASS_PICTURES  # of class pictures, then all; held-out ones, and examples
    assert [(record["encoded"], record["cached"]) for record in pair.records] == [(prompts, pixels)] * 2
    assert [record["drawn"] for record in pair.records] == [2 + 3, 1]  # the first has the two validations and the end


@pytest.mark.parametrize("kind", list(SCRIPTS))
def test_two_processes_resume_the_run_never_stopped(kind: str, pairs: dict[str, Trained]) -> None:
    """Each process draws what it drew, and logs what it logged; a step has pictures of several sizes."""
    pair, again = pairs[f"{kind}, whole"], pairs[f"{kind}, resumed"]
    for whole, resumed in zip(pair.records, again.records, strict=True):
        assert len(whole["micro_batches"]) == 4 and resumed["micro_batches"] == whole["micro_batches"][2:]
        for got, expected in zip(resumed["logged"], whole["logged"][2:], strict=True):
            assert [got[name] for name in ("loss", "grad_norm")] == [expected[name] for name in ("loss", "grad_norm")]
    assert torch.equal(pair.weights, again.weights)
    assert len(list((pair.folder / "checkpoint-2").glob("random_states_*.pkl"))) == 2  # one a process
    assert sorted(part["keys"][0]["example"] for part in micro_batches_of(pair, epoch=0)) == list(range(PICTURES))
