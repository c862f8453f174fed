"""What several processes cost: bytes sent a step and host memory, counted on the CPU for benchmarks/scaling.md.

    python -m benchmarks.scaling            # a few minutes

Each engine of accelerate_configs/ trains the tiny checkpoint for a step on two processes, and the medium one on one,
two and four. Bytes are those of the collectives inside the step, by the ring algorithms' share of a process:
all-gather and reduce-scatter (N - 1) / N of the whole, all-reduce twice that.
"""

import argparse
import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
SCRIPTS = {"full": "train_dreambooth_flux", "lora": "train_dreambooth_lora_flux"}
ENGINES = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")


class Traffic(TorchDispatchMode):
    """Counts what collectives move, in bytes of a process."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            kind, processes = name.removeprefix("c10d::"), PartialState().num_processes
            largest = max(sum_bytes(part) for part in args[:2])  # of a gather the output, of a scatter the input
            rounds = 2 if "allreduce" in kind else 1
            self.moved[kind] = self.moved.get(kind, 0) + rounds * largest * (processes - 1) / processes
        return func(*args, **(kwargs or {}))


def sum_bytes(part: Any) -> int:
    """Bytes of the tensors in a nested list."""
    if isinstance(part, torch.Tensor):
        return part.nbytes
    return sum(sum_bytes(item) for item in part) if isinstance(part, (list, tuple)) else 0


def run_counted(name: str, report: Path, flags: list[str]) -> None:
    """Run a script on this process, and write its traffic in a step and its peak memory."""
    script: Any = importlib.import_module(name)
    traffic, accumulate = Traffic(), script.accumulate

    @contextlib.contextmanager
    def counted(*args: Any) -> Iterator[None]:
        with accumulate(*args), traffic:
            yield

    script.accumulate = counted
    if "SHARD_ON_CPU" in os.environ:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    script.main(script.parse_args(flags))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rank = int(os.environ.get("RANK", 0))
    report.with_suffix(f".{rank}").write_text(json.dumps({"traffic": traffic.moved, "peak": peak}))


def launch(engine: str, kind: str, processes: int, checkpoint: Path, home: Path, *extra: str) -> list[dict[str, Any]]:
    """Run a script under an engine; what each process reports."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{engine}.yaml").read_text())
    config |= {"num_processes": processes, "mixed_precision": "no", "main_process_port": 29655}
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    environment |= {"SHARD_ON_CPU": "1"} if engine not in ("ddp", "one_gpu") else {"ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={home / 'config.yaml'}"]
    command += [__file__, "--script", SCRIPTS[kind], "--report", str(home / "report"), "--"]
    command += [f"--pretrained_model_name_or_path={checkpoint}", f"--instance_data_dir={home / 'pictures'}"]
    command += ["--instance_prompt=a dog", f"--output_dir={home / 'out'}", "--resolution=32", "--train_batch_size=1"]
    command += ["--max_sequence_length=16", "--max_train_steps=1", "--report_to=none", "--seed=0", *extra]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((home / f"report.{rank}").read_text()) for rank in range(processes)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for size in ("tiny", "medium"):
            command = [
                sys.executable,
                "random_flux.py",
                str(home / size),
                "--size",
                size,
                "--pictures",
                str(home / "pictures"),
            ]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        for engine in ENGINES:
            for kind in SCRIPTS:
                [report, *_] = launch(engine, kind, 2, home / "tiny", home)
                moved = {name: round(value) for name, value in report["traffic"].items()}
                print(f"{engine:16} {kind}: {sum(moved.values()):,} bytes a step {moved}", flush=True)
        for engine in ("one_gpu", *ENGINES):
            for processes in (1,) if engine == "one_gpu" else (2, 4):
                peaks = [report["peak"] / 2**30 for report in launch(engine, "lora", processes, home / "medium", home)]
                print(
                    f"{engine:16} lora, medium, {processes}: {sum(peaks):.2f} GiB {[round(p, 2) for p in peaks]}",
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--script")
    parser.add_argument("--report", type=Path)
    parser.add_argument("flags", nargs="*")
    given = parser.parse_args()
    if given.script:
        run_counted(given.script, given.report, given.flags)
    else:
        main()
