"""FSDP2 and DeepSpeed on two real processes train, validate, checkpoint, resume and save what one process does."""

import argparse
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from conftest import SCRIPTS, one_script
from tests.processes import ROOT, launch_jobs, read_records
from tests.record_run import record_run

pytestmark = one_script

# Engine, script, and how each is run: all four steps with validation; the last two of them from the checkpoint; these
# from the checkpoint of one process, whose optimizer state does not fit; "asked": with what is off by default.
RUNS = {
    ("fsdp2", "full"): ["whole", "resumed", "asked"],
    ("fsdp2", "lora"): ["whole", "resumed", "asked"],
    ("deepspeed_zero2", "full"): ["whole", "resumed", "from one"],
    ("deepspeed_zero3", "full"): ["whole"],
    ("deepspeed_zero3", "lora"): ["whole", "resumed", "asked"],
}
RESUMED = [case for case, runs in RUNS.items() if "resumed" in runs]
# Three pictures and five examples on two processes: both are uneven. A schedule that moves, so that its place matters.
COMMON = [
    "--instance_prompt=a photo of sks dog", "--resolution=32", "--max_sequence_length=16", "--seed=0",
    "--report_to=none", "--max_train_steps=4", "--checkpointing_steps=2", "--upcast_before_saving",
    "--learning_rate=0.01", "--adam_epsilon=0.1", "--max_grad_norm=0.5", "--lr_scheduler=linear", "--lr_warmup_steps=2",
]  # fmt: skip
VALIDATION = [
    "--validation_prompt=a dog", "--num_validation_images=3", "--validation_num_inference_steps=3",
    "--validation_epochs=1", "--validation_loss",
]  # fmt: skip


ASKED = ["--cache_latents", "--cached_views=2", "--random_flip", "--trigger_word=ohwx", "--validation_resolution=48"]
OWN_ASKED = {  # the prior is nothing before the first update, and little after small ones
    "full": [],
    "lora": [
        "--prior_from_base_model", "--class_prompt=a photo of a dog", "--prior_loss_weight=100",
        "--lr_scheduler=constant", "--adam_epsilon=1e-3",
    ],
}  # fmt: skip


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All trained weights of a result or a checkpoint."""
    files = [*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]
    return {name: value for file in files for name, value in load_file(file).items()}


def distance(first: Path, second: Path) -> float:
    """The largest difference between two folders' weights."""
    left, right = read_weights(first), read_weights(second)
    assert left.keys() == right.keys() and left
    return max((left[name] - right[name]).abs().max().item() for name in left)


def config_of(engine: str, home: Path, precision: str = "no") -> str:
    """A file of `accelerate_configs/` for two processes, in float32 unless `precision` says otherwise."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{engine}.yaml").read_text())
    path = home / f"{engine}-{precision}.yaml"
    path.write_text(yaml.safe_dump(config | {"num_processes": 2, "mixed_precision": precision}))
    return str(path)


@pytest.fixture(scope="module")
def base(tiny_flux: Path, pictures: Path) -> list[str]:
    return [*COMMON, f"--pretrained_model_name_or_path={tiny_flux}", f"--instance_data_dir={pictures}"]


@pytest.fixture(scope="module")
def asked(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Flags of what is off by default, by script; the masks are the pictures in grey, and one picture has none."""
    masks = tmp_path_factory.mktemp("masks")
    for path in sorted(pictures.iterdir())[1:]:
        Image.open(path).convert("L").save(masks / f"{path.stem}.png")
    return {name: [*ASKED, *own, f"--mask_data_dir={masks}"] for name, own in OWN_ASKED.items()}


@pytest.fixture(scope="module")
def one(base: list[str], asked: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one process makes of steps of two examples, by script, and with what is off by default."""
    runs = {name: (name, []) for name in SCRIPTS} | {f"{name} asked": (name, flags) for name, flags in asked.items()}
    runs["lora accumulated"] = ("lora", [*asked["lora"], "--gradient_accumulation_steps=2"])
    runs["lora without"] = ("lora", [*asked["lora"], "--prior_loss_weight=0"])
    folders = {run: tmp_path_factory.mktemp(f"one-{run.replace(' ', '-')}") for run in runs}
    for run, (name, flags) in runs.items():
        own = ["--train_batch_size=2", f"--output_dir={folders[run]}", *flags]
        record = record_run(SCRIPTS[name], [*base, *VALIDATION, *own])
        (folders[run] / "0.json").write_text(json.dumps(record))
    return folders


@pytest.fixture(scope="module")
def many(
    base: list[str], asked: dict[str, list[str]], one: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, str], Path]:
    """What two processes make of them, by engine, script and run, in one launch."""
    home, jobs = tmp_path_factory.mktemp("engines"), dict[Path, dict[str, Any]]()
    folders = {(*case, run): home / "-".join([*case, run]) for case, runs in RUNS.items() for run in runs}
    for (engine, script, run), folder in folders.items():
        before = {"resumed": folders[engine, script, "whole"], "from one": one[script]}.get(run)
        extra = [f"--resume_from_checkpoint={before / 'checkpoint-2'}"] if before else VALIDATION
        extra = [*extra, *asked[script]] if run == "asked" else extra
        flags = [*base, "--train_batch_size=1", f"--output_dir={folder}", *extra]
        job = {"script": SCRIPTS[script].__name__, "flags": flags, "config": config_of(engine, home)}
        jobs[folder] = job | {"environment": {"SHARD_ON_CPU": "1"}}
    flags = [*base, *VALIDATION, "--train_batch_size=1", f"--output_dir={home / 'machines'}/{{rank}}/out"]
    # Each process as it is on a machine of its own.
    alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    jobs[home / "machines"] = {
        "script": SCRIPTS["lora"].__name__, "flags": flags, "config": config_of("ddp", home), "environment": alone,
    }  # fmt: skip
    folders["ddp", "lora", "machines"] = home / "machines"
    # Four examples a step of five: in every second step fillers run.
    folders["ddp", "lora", "asked"] = home / "ddp-asked"
    flags = [*base, *VALIDATION, *asked["lora"], "--train_batch_size=1", "--gradient_accumulation_steps=2"]
    job = {"script": SCRIPTS["lora"].__name__, "flags": [*flags, f"--output_dir={home / 'ddp-asked'}"]}
    jobs[home / "ddp-asked"] = job | {"config": config_of("ddp", home)}
    # In fp16 from a checkpoint in float32, which has no state of the scaler; in bf16 with a validation at the end.
    before = folders["fsdp2", "lora", "whole"] / "checkpoint-2"
    half = {
        ("lora", "fp16"): [f"--resume_from_checkpoint={before}"],
        ("full", "bf16"): [*VALIDATION, "--max_train_steps=2"],
    }
    for (script, precision), extra in half.items():
        folder = folders["fsdp2", script, precision] = home / f"fsdp2-{script}-{precision}"
        flags = [*base, "--train_batch_size=1", f"--output_dir={folder}", "--skip_final_inference", *extra]
        job = {
            "script": SCRIPTS[script].__name__,
            "flags": [*flags, "--validation_steps=2"] if script == "full" else flags,
        }
        jobs[folder] = job | {"config": config_of("fsdp2", home, precision), "environment": {"SHARD_ON_CPU": "1"}}
    launch_jobs(jobs, home, DS_ACCELERATOR="cpu")
    return folders


def logged(folder: Path, name: str) -> list[float]:
    return [values[name] for values in read_records(folder)[0]["logged"] if name in values]


@pytest.mark.parametrize(("engine", "script"), RUNS)
def test_two_processes_train_what_one_trains(engine: str, script: str, one: Any, many: Any) -> None:
    folder = many[engine, script, "whole"]
    assert [record["processes"] for record in read_records(folder)] == [2, 2]
    facts = json.loads((folder / "checkpoint-2" / "training_state.json").read_text())["facts"]["data"]
    assert facts["engine"] == {"fsdp2": "FSDP2", "deepspeed_zero2": "ZeRO-2", "deepspeed_zero3": "ZeRO-3"}[engine]
    for name in ("loss", "grad_norm", "lr"):
        assert len(logged(folder, name)) == 4
        assert logged(folder, name) == pytest.approx(logged(one[script], name), rel=1e-5)
    assert distance(folder, one[script]) < 1e-5


@pytest.mark.parametrize(("engine", "script"), RUNS)
def test_two_processes_validate_as_one_does(engine: str, script: str, one: Any, many: Any) -> None:
    folder = many[engine, script, "whole"]
    assert logged(folder, "validation_loss") == pytest.approx(logged(one[script], "validation_loss"), rel=1e-5)
    for name in [f"validation/step_000003_{number}.png" for number in range(3)] + [f"image_{n}.png" for n in range(3)]:
        got, expected = (np.asarray(Image.open(path / name), dtype=int) for path in (folder, one[script]))
        assert abs(got - expected).max() <= 1, name


@pytest.mark.parametrize(
    ("engine", "script", "reference"),
    [
        ("fsdp2", "full", "full asked"),
        ("fsdp2", "lora", "lora asked"),
        ("deepspeed_zero3", "lora", "lora asked"),
        ("ddp", "lora", "lora accumulated"),
    ],
)
def test_two_processes_do_what_is_off_by_default_as_one_does(
    engine: str, script: str, reference: str, one: Any, many: Any
) -> None:
    folder, alone = many[engine, script, "asked"], one[reference]
    assert logged(folder, "loss") == pytest.approx(logged(alone, "loss"), rel=1e-4)
    assert logged(folder, "loss")[0] != pytest.approx(logged(one[script], "loss")[0], rel=1e-3)
    assert logged(folder, "validation_loss") == pytest.approx(logged(alone, "validation_loss"), rel=1e-5)
    assert distance(folder, alone) < 1e-4
    assert Image.open(folder / "image_2.png").size == (48, 48)


def test_the_prior_counts_in_what_two_processes_are_compared_with(one: Any) -> None:
    assert logged(one["lora asked"], "loss")[0] == pytest.approx(logged(one["lora without"], "loss")[0], rel=1e-6)
    assert logged(one["lora asked"], "loss")[3] > 1.005 * logged(one["lora without"], "loss")[3]


@pytest.mark.parametrize(("engine", "script"), RESUMED)
def test_a_resumed_run_is_the_run_that_never_stopped(engine: str, script: str, many: Any) -> None:
    whole, resumed = (many[engine, script, run] for run in ("whole", "resumed"))
    assert logged(resumed, "loss") == logged(whole, "loss")[2:]
    assert distance(whole, resumed) == 0


def test_a_checkpoint_of_one_process_gives_its_weights_and_schedule_to_an_engine(one: Any, many: Any) -> None:
    folder = many["deepspeed_zero2", "full", "from one"]
    assert logged(folder, "loss")[0] == pytest.approx(logged(one["full"], "loss")[2], rel=1e-5)
    assert logged(folder, "lr") == logged(one["full"], "lr")[2:]


def test_shards_go_on_in_fp16_from_a_checkpoint_in_float32(many: Any) -> None:
    whole, half = (logged(many["fsdp2", "lora", run], "loss") for run in ("whole", "fp16"))
    assert half == pytest.approx(whole[2:], rel=1e-2)


def test_what_a_validation_left_gathered_in_bf16_is_saved_as_it_is_trained(many: Any) -> None:
    weights = read_weights(many["fsdp2", "full", "bf16"])
    outside = {name: value for name, value in weights.items() if "blocks" not in name}
    assert outside and all(value.dtype == torch.float32 for value in outside.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in outside.values())


@pytest.mark.parametrize(("engine", "script"), RUNS)
def test_only_one_process_reads_the_transformer(engine: str, script: str, many: Any) -> None:
    assert [record["reads"] for record in read_records(many[engine, script, "whole"])] == [1, 0]


@pytest.mark.parametrize(("engine", "script"), RUNS)
def test_the_result_loads_into_a_pipeline(engine: str, script: str, tiny_flux: Path, many: Any) -> None:
    folder = many[engine, script, "whole"]
    if script == "full":
        pipeline = FluxPipeline.from_pretrained(folder)
    else:
        pipeline = FluxPipeline.from_pretrained(tiny_flux)
        pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    state, saved = pipeline.transformer.state_dict(), read_weights(folder)
    assert sum(value.numel() for name, value in state.items() if script == "full" or "lora" in name) == sum(
        value.numel() for value in saved.values()
    )


def test_fsdps_lora_checkpoint_leaves_the_frozen_base_out(many: Any) -> None:
    folder = many["fsdp2", "lora", "whole"] / "checkpoint-2" / "pytorch_model_fsdp_0"
    names = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert names and all("lora" in name for name in names)


def test_zeros_lora_checkpoint_leaves_the_frozen_base_out(tiny_flux: Path, many: Any) -> None:
    checkpoint = many["deepspeed_zero3", "lora", "whole"] / "checkpoint-2" / "pytorch_model"
    base = (tiny_flux / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert 0 < sum(path.stat().st_size for path in checkpoint.iterdir()) < base / 3


def test_two_machines_train_together_and_save_once(one: Any, many: Any) -> None:
    """Each has an output folder of its own, as without a shared disk."""
    folder = many["ddp", "lora", "machines"]
    assert [record["processes"] for record in read_records(folder)] == [2, 2]
    assert logged(folder, "loss") == pytest.approx(logged(one["lora"], "loss"), rel=1e-5)
    first, second = (folder / str(rank) / "out" for rank in range(2))
    assert distance(first, one["lora"]) < 1e-5
    assert (first / "image_2.png").is_file()
    assert [path.name for path in second.iterdir() if not path.name.startswith(".")] == []


def test_every_process_runs_as_many_forwards_and_each_picture_is_drawn_once(script: ModuleType) -> None:
    for processes, count in itertools.product((1, 2, 3, 4, 7), (1, 2, 5, 8)):
        shares = [
            list(script.own_share(SimpleNamespace(process_index=rank, num_processes=processes), count))
            for rank in range(processes)
        ]
        assert len({len(share) for share in shares}) == 1, (processes, count)
        assert sorted(number for share in shares for number in share if number < count) == list(range(count))


REFUSED = {
    "full": ["--train_text_encoder", "--optimizer=adafactor", "--full_bf16", "--fused_backward_pass", "--use_ema"],
    "lora": ["--train_text_encoder", "--optimizer=prodigy", "--base_quantization=int8", "--blocks_to_swap=1"],
}


@pytest.mark.parametrize("engine", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_what_shards_cannot_do_is_refused_by_name(engine: str) -> None:
    for kind, flag in ((kind, flag) for kind, flags in REFUSED.items() for flag in flags):
        name, _, value = flag.removeprefix("--").partition("=")
        args = argparse.Namespace(train_text_encoder=False, optimizer="AdamW", use_8bit_adam=False)
        setattr(args, name, int(value) if value.isdigit() else value or True)
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
        accelerator = SimpleNamespace(distributed_type=engine, state=state, is_fsdp2=True)
        with pytest.raises(SCRIPTS[kind].UsageError, match=f"--{name}"):
            SCRIPTS[kind].set_up_engine(args, accelerator)


def test_eight_bit_adam_is_refused_under_fsdp2(script: ModuleType) -> None:
    args = argparse.Namespace(train_text_encoder=False, optimizer="AdamW", use_8bit_adam=True)
    with pytest.raises(script.UsageError, match="--use_8bit_adam"):
        script.set_up_engine(args, SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True))


def test_fsdp1_is_refused(script: ModuleType) -> None:
    args = argparse.Namespace(train_text_encoder=False, optimizer="AdamW", use_8bit_adam=False)
    state = SimpleNamespace(fsdp_plugin=None)
    with pytest.raises(script.UsageError, match="fsdp_version: 2"):
        script.set_up_engine(args, SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False, state=state))


@pytest.mark.parametrize(
    ("before", "now", "fits"),
    [
        (("DDP", 2), ("DDP", 1), True),
        (("FSDP2", 8), ("FSDP2", 4), True),
        (("ZeRO-3", 8), ("ZeRO-3", 8), True),
        (("ZeRO-3", 8), ("ZeRO-3", 4), False),
        (("ZeRO-2", 8), ("ZeRO-3", 8), False),
        (("ZeRO-3", 8, "bf16"), ("ZeRO-3", 8, "no"), False),  # DeepSpeed names its files by it
        (("FSDP2", 8, "bf16"), ("FSDP2", 4, "no"), True),
        (("DDP", 2), ("FSDP2", 2), False),
    ],
)
def test_an_optimizers_state_is_kept_where_it_fits(script: ModuleType, before: Any, now: Any, fits: bool) -> None:
    facts = [dict(zip(("engine", "processes", "precision"), run, strict=False)) for run in (before, now)]
    assert script.optimizer_fits(*facts) is fits


def test_fsdps_own_checkpointing_which_renames_weights_is_refused(script: ModuleType) -> None:
    plugin = SimpleNamespace(activation_checkpointing=True)
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True, state=state)
    args = script.parse_args([*COMMON, "--pretrained_model_name_or_path=x", "--instance_data_dir=y"])
    with pytest.raises(script.UsageError, match="fsdp_activation_checkpointing; set it to false"):
        script.set_up_engine(args, accelerator)


@pytest.mark.parametrize(("engine", "wanted"), [("FSDP", 2 * 4 + 80), ("MULTI_GPU", 4 + 80), ("DEEPSPEED", 4 + 3 * 80)])
def test_the_bytes_of_a_checkpoint_are_those_of_all_processes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, wanted: int
) -> None:
    """FSDP2 writes shards beside the whole, DeepSpeed a part of each process; here 1,000 numbers and 80,000 bytes."""
    accelerator = SimpleNamespace(distributed_type=DistributedType[engine], num_processes=3, is_main_process=True)
    optimizer = SimpleNamespace(state_dict=lambda: {"state": torch.zeros(20_000)})
    trained = SimpleNamespace(size=1000, ema=None, optimizer=optimizer)
    state, args = SimpleNamespace(step=1), argparse.Namespace(output_dir=str(tmp_path))
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(script.RunError, match=f"needs about {2**20 + 1000 * wanted:,} bytes"):
        script.save_checkpoint(SimpleNamespace(args=args, accelerator=accelerator, trained=trained, state=state))


def check_machines(script: ModuleType, tmp_path: Path, seen: Any, engine: str, resumed: Any, **flags: Any) -> None:
    """`check_machines` of process 0, where the other says that it has `seen`."""
    accelerator = SimpleNamespace(
        is_main_process=True, distributed_type=engine, state=None, wait_for_everyone=lambda: None
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "broadcast_object_list", list)
        patch.setattr(script, "gather_object", lambda mine: [*mine, seen])
        given = {"class_data_dir": str(tmp_path), "num_class_images": 1} | flags
        args = argparse.Namespace(output_dir=str(tmp_path), **{"with_prior_preservation": False} | given)
        script.check_machines(args, accelerator, resumed, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (([("instance", "other.png", "a dog")], None, ["--output_dir"]), "different pictures"),
        (([], "another", ["--output_dir"]), "not the same on all machines"),
        (([], None, []), "--output_dir is .* not all machines share"),
    ],
)
def test_what_a_machine_lacks_is_said(script: ModuleType, tmp_path: Path, seen: Any, message: str) -> None:
    with pytest.raises(script.UsageError, match=message):
        check_machines(
            script, tmp_path, seen, DistributedType.FSDP, script.Checkpoint(tmp_path, {}) if seen[1] else None
        )


def test_replicas_need_no_shared_output_folder(script: ModuleType, tmp_path: Path) -> None:
    check_machines(script, tmp_path, ([], None, []), DistributedType.MULTI_GPU, None)
    with pytest.raises(script.UsageError, match=r"--class_data_dir is .* not all machines share"):
        check_machines(script, tmp_path, ([], None, []), DistributedType.MULTI_GPU, None, with_prior_preservation=True)


def test_unwrapping_a_model_does_not_import_deepspeed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's does, which costs runs that do not use it a second."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # an import would raise
    inner = torch.nn.Linear(1, 1)
    outer = torch.nn.Module()
    outer.module = inner
    assert script.unwrap(outer) is inner and script.unwrap(inner) is inner
