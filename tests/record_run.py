"""Run training scripts on two processes and record what they do, for test_processes.py and test_engines.py.

python tests/record_run.py JOBS.json

JOBS.json maps folders to jobs, as `processes.launch_jobs` says. Each process writes <folder>/<rank>.json.
Both are forked from one that has imported everything, in the environment that `accelerate launch` would give them.
With SHARD_ON_CPU in the environment, FSDP2 and DeepSpeed run although there is no GPU.
"""

import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.run
from accelerate import Accelerator
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType


def record_run(script: ModuleType, argv: list[str]) -> dict[str, Any]:
    """Run a script's main with a fresh accelerate, and return what it did.

    Returns:
        "rank" and "processes"; "micro_batches": of each its keys, sigmas, and a number that tells noise and latents
        from others; "logged": the values of each step; "weights": the sum of each trained weight at the end.
    """
    record: dict[str, Any] = {"micro_batches": [], "logged": []}
    reads: list[bool] = []
    collate, training_loss, save_results = script.collate, script.training_loss, script.save_results
    load_base = script.load_base

    def record_keys(examples: list[dict[str, Any]]) -> dict[str, Any]:
        record["micro_batches"].append({"keys": [example["key"]._asdict() for example in examples]})
        batch: dict[str, Any] = collate(examples)
        return batch

    def record_inputs(transformer: Any, inputs: Any) -> Any:
        if torch.is_grad_enabled():  # else it is the validation's
            numbers = {name: getattr(inputs, name).flatten(1).sum(1).tolist() for name in ("noise", "latents")}
            record["micro_batches"][-1].update(numbers, sigmas=inputs.sigmas.tolist())
        return training_loss(transformer, inputs)

    def record_read(*args: Any, **options: Any) -> Any:
        reads.append(True)
        return load_base(*args, **options)

    def record_result(args: Any, accelerator: Any, trained: Any, dtype: Any) -> None:
        record["reads"] = reads.count(True)
        record["rank"], record["processes"] = accelerator.process_index, accelerator.num_processes
        record["weights"] = [float(parameter.detach().double().sum()) for parameter in trained.parameters]
        save_results(args, accelerator, trained, dtype)

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if "SHARD_ON_CPU" in os.environ:  # accelerate passes FSDP2 and DeepSpeed over where it sees no GPU
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # which compiles for a minute what no training calls
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "VALIDATION_SIGMAS", 2)  # in place of 8: ZeRO-3's forwards take a third of a second
        patch.setattr(script, "collate", record_keys)
        patch.setattr(script, "training_loss", record_inputs)
        patch.setattr(script, "save_results", record_result)
        patch.setattr(script, "load_base", record_read)
        patch.setattr(Accelerator, "log", lambda self, values, *_, **__: record["logged"].append(values))
        script.main(script.parse_args(argv))
    return record


def launched_environment(config: str) -> dict[str, str]:
    """What `accelerate launch` adds to the environment of the processes that it starts by a configuration."""
    found: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed.run, "run", lambda _: found.update(os.environ))
        launch_command(launch_command_parser().parse_args([f"--config_file={config}", "script.py"]))
    assert found
    return found


def run_job(folder: Path, job: dict[str, Any]) -> None:
    """Run a job of `processes.launch_jobs` in its own environment, and write what this process recorded."""
    before, script = dict(os.environ), importlib.import_module(job["script"])
    environment = launched_environment(job["config"]) if job.get("config") else {}
    own = {name: before[name] for name in rank_environment(0, 0)}
    os.environ.update(environment | own | job.get("environment", {}))
    if "SHARD_ON_CPU" in os.environ and "ACCELERATE_USE_DEEPSPEED" in os.environ:
        os.environ.pop("ACCELERATE_USE_CPU")
    gc.collect()
    gc.freeze()  # as the scripts do when they are started: each of their collections would take 0.3 s
    record = record_run(script, [flag.replace("{rank}", own["RANK"]) for flag in job["flags"]])
    (folder / f"{record['rank']}.json").write_text(json.dumps(record))
    os.environ.clear()
    os.environ.update(before)


def rank_environment(rank: int, port: int) -> dict[str, str]:
    """What a launcher adds to the environment of one of two processes."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def run_jobs(jobs: dict[str, dict[str, Any]], rank: int, port: int) -> None:
    """Run all jobs as one of the two processes; does not return."""
    code = 1
    try:
        os.environ.update(rank_environment(rank, port), ACCELERATE_MIXED_PRECISION="no", ACCELERATE_DYNAMO_BACKEND="no")
        # All jobs share one process group: the next one's processes would meet while the last one's are still leaving.
        PartialState.destroy_process_group = lambda *_: None  # type: ignore[method-assign]
        for name, job in jobs.items():
            run_job(Path(name), job)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for job in jobs.values():
        importlib.import_module(job["script"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = set[int]()
    for rank in range(2):
        process = os.fork()
        if process == 0:
            run_jobs(jobs, rank, port)
        processes.add(process)
    while processes:
        process, status = os.wait()
        processes.remove(process)
        if status:
            for other in processes:  # which would wait for this one
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
