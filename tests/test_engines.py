"""FSDP2 and DeepSpeed on two real processes train, validate, checkpoint, resume and save what one process does."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

from conftest import SCRIPTS
from tests.record_run import record_run

ROOT = Path(__file__).parent.parent
ENGINES = {"fsdp2": "FSDP2", "deepspeed_zero2": "ZeRO-2", "deepspeed_zero3": "ZeRO-3"}
CASES = list(itertools.product(ENGINES, SCRIPTS))
# Three pictures and five examples on two processes: both are uneven. A warm-up, so that its place matters.
COMMON = [
    "--instance_prompt=a photo of sks dog", "--resolution=32", "--max_sequence_length=16", "--seed=0",
    "--report_to=none", "--max_train_steps=4", "--checkpointing_steps=2", "--upcast_before_saving",
    "--learning_rate=0.01", "--adam_epsilon=0.1", "--max_grad_norm=0.5", "--lr_scheduler=linear", "--lr_warmup_steps=2",
    "--validation_prompt=a dog", "--num_validation_images=3", "--validation_epochs=1", "--validation_loss",
]  # fmt: skip


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All trained weights in a result or a checkpoint."""
    files = [*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]
    return {name: value for file in files for name, value in load_file(file).items()}


def distance(first: Path, second: Path) -> float:
    """The largest difference between two folders' weights."""
    left, right = read_weights(first), read_weights(second)
    assert left.keys() == right.keys() and left
    return max((left[name] - right[name]).abs().max().item() for name in left)


def launch(engine: str, jobs: dict[str, list[str]], home: Path, *flags: str) -> None:
    """Run jobs of record_run.py on two processes, as `accelerate_configs/` says, but for what needs a GPU."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{engine}.yaml").read_text())
    config |= {"num_processes": 2, "mixed_precision": "no", "main_process_port": 0}
    (home / f"{engine}.yaml").write_text(yaml.safe_dump(config))
    (home / f"{engine}.json").write_text(json.dumps(jobs))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(home), "SHARD_ON_CPU": "1"}
    environment |= {"DS_ACCELERATOR": "cpu"}
    if engine.startswith("deepspeed"):
        environment.pop("ACCELERATE_USE_CPU", None)
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={home / engine}.yaml", *flags]
    command += [str(ROOT / "tests" / "record_run.py"), str(home / f"{engine}.json")]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def home(tiny_flux: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs lie: <engine>-<script>-<run>; "one" is one process with both examples of a step."""
    home = tmp_path_factory.mktemp("engines")
    for name, script in SCRIPTS.items():
        folder = home / f"one-{name}-whole"
        folder.mkdir()
        argv = [*flags_of(tiny_flux, pictures), "--train_batch_size=2", f"--output_dir={folder}"]
        (folder / "0.json").write_text(json.dumps(record_run(script, argv)))
    return home


def flags_of(checkpoint: Path, pictures: Path) -> list[str]:
    return [*COMMON, f"--pretrained_model_name_or_path={checkpoint}", f"--instance_data_dir={pictures}"]


@pytest.fixture(scope="module")
def engines(home: Path, tiny_flux: Path, pictures: Path) -> Path:
    """A launch for each engine runs each script twice: all four steps, and the last two from the checkpoint."""
    for engine in ENGINES:
        jobs = {}
        for name, script in SCRIPTS.items():
            for run, extra in {
                "whole": [],
                "resumed": [f"--resume_from_checkpoint={home / f'{engine}-{name}-whole' / 'checkpoint-2'}"],
                "from-one": [f"--resume_from_checkpoint={home / f'one-{name}-whole' / 'checkpoint-2'}"],
            }.items():
                folder = home / f"{engine}-{name}-{run}"
                folder.mkdir()
                flags = [*flags_of(tiny_flux, pictures), "--train_batch_size=1", f"--output_dir={folder}", *extra]
                jobs[str(folder)] = [script.__name__, *flags]
        launch(engine, jobs, home)
    return home


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, engines: Path) -> Iterator[tuple[Path, Path]]:
    """The folders of one process and of an engine's two, up to the last word: which run."""
    engine, script = request.param
    return engines / f"one-{script}", engines / f"{engine}-{script}"


def run_folder(prefix: Path, run: str) -> Path:
    return prefix.with_name(f"{prefix.name}-{run}")


def logged(prefix: Path, run: str, name: str) -> list[float]:
    record: dict[str, Any] = json.loads((run_folder(prefix, run) / "0.json").read_text())
    assert record["processes"] == (1 if prefix.name.startswith("one") else 2)
    return [values[name] for values in record["logged"] if name in values]


def test_an_engine_trains_what_one_process_trains(case: tuple[Path, Path]) -> None:
    one, many = case
    for name in ("loss", "grad_norm", "lr"):
        assert len(logged(one, "whole", name)) == 4
        assert logged(many, "whole", name) == pytest.approx(logged(one, "whole", name), rel=1e-5)
    assert distance(run_folder(one, "whole"), run_folder(many, "whole")) < 1e-5
