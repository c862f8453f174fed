"""Run training scripts on two processes and record what they do, for test_processes.py and test_engines.py.

python tests/record_run.py JOBS.json

JOBS.json maps folders to jobs, as `processes.launch_jobs` says. Each process writes <folder>/<rank>.json.
Both are forked from one that has imported everything, in the environment that `accelerate launch` would give them.
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

    The loss of each micro-batch of an odd position in the second process comes with another number, "odd", twice it.

    Returns:
        "processes"; "micro_batches": of each its keys, sigmas, loss, and sums of noise and latents; "logged": the
        values of each step; "weights": the sum of each at the end; "encoded", "cached", "drawn": how many prompts,
        pixels and pictures went through the models.
    """
    record: dict[str, Any] = {"micro_batches": [], "logged": [], "encoded": 0, "cached": 0, "drawn": 0}
    collate, training_loss, save_result = script.collate, script.training_loss, script.save_result

    def record_keys(examples: list[dict[str, Any]]) -> Any:
        record["micro_batches"].append({"keys": [example["key"]._asdict() for example in examples]})
        return collate(examples)

    def record_loss(transformer: Any, inputs: Any) -> dict[str, torch.Tensor]:
        losses: dict[str, torch.Tensor] = training_loss(transformer, inputs)
        if torch.is_grad_enabled():  # else it is the validation's
            micro_batch = record["micro_batches"][-1]
            numbers = {name: getattr(inputs, name).flatten(1).sum(1).tolist() for name in ("noise", "latents")}
            micro_batch.update(numbers, sigmas=inputs.sigmas.tolist(), loss=losses["loss"].item())
            if PartialState().process_index == 1 and micro_batch["keys"][0]["position"] % 2:
                losses["odd"] = 2 * losses["loss"]
        return losses

    def count(patch: pytest.MonkeyPatch, name: str, place: int, counted: str) -> None:
        function = getattr(script, name)

        def call(*args: Any, **options: Any) -> Any:
            record[counted] += len(args[place])
            return function(*args, **options)

        patch.setattr(script, name, call)

    def record_result(run: Any) -> None:
        record["processes"] = run.accelerator.num_processes
        record["weights"] = [float(parameter.detach().double().sum()) for parameter in run.parameters]
        save_result(run)

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # accelerate passes it over where it sees no GPU
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "VALIDATION_SIGMAS", 2)  # in place of 8
        patch.setattr(script, "collate", record_keys)
        patch.setattr(script, "training_loss", record_loss)
        patch.setattr(script, "save_result", record_result)
        patch.setattr(Accelerator, "log", lambda self, values, *_, **__: record["logged"].append(values))
        count(patch, "encode_prompts", 2, "encoded")
        count(patch, "encode_pixels", 1, "cached")
        count(patch, "draw_pictures", 3, "drawn")
        script.main(script.parse_args(argv))
    return record


def launched_environment(config: str) -> dict[str, str]:
    """What `accelerate launch` adds to the environment of the processes that it starts by a configuration."""
    found: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed.run, "run", lambda _: found.update(os.environ))
        launch_command(launch_command_parser().parse_args([f"--config_file={config}", "script.py"]))
    return found


def run_jobs(jobs: dict[str, dict[str, Any]], rank: int, port: int) -> None:
    """Run all jobs as one of the two processes, and write what it recorded; does not return."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    own = {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    own |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
    before, code = dict(os.environ), 1
    try:
        # All jobs share one process group: the next one's processes would meet while the last one's are still leaving.
        PartialState.destroy_process_group = lambda *_: None  # type: ignore[method-assign]
        for folder, job in jobs.items():
            os.environ.clear()
            launched = launched_environment(job["config"]) if "config" in job else {}
            os.environ.update(before | own | launched | {name: own[name] for name in numbers})
            gc.collect()
            gc.freeze()  # as the scripts do when they are started: each of their collections would take 0.3 s
            record = record_run(importlib.import_module(job["script"]), job["flags"])
            Path(folder, f"{rank}.json").write_text(json.dumps(record))
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
