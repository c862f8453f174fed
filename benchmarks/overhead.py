"""What the scripts add to the bare training step of the same model, and to its memory. On the CPU, at `medium` size.

    python -m benchmarks.overhead                     # both scripts in float32 and bf16: step times, then peak memory

Time: a script's `main` runs, and after each of its optimizer steps a bare step of the same model is done in the same
process: forward, loss, backward, clip, fused AdamW. So both meet the same moments of a busy machine. A script's step is
everything from one step's end to the next one's, logging included. Processor time is compared too: it does not depend
on what else the machine does (set OMP_WAIT_POLICY=passive, or threads that wait for each other count as well).

Memory: a script as a process of its own, against a process that loads the transformer and trains it, which is the
largest stage.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from accelerate.state import AcceleratorState
from diffusers import FluxTransformer2DModel
from peft import LoraConfig

from benchmarks.run import GIB, RESOLUTIONS, SCRIPTS, TEXT_LENGTHS, environment, launcher, make_inputs, run_flags


def load_script(name: str) -> ModuleType:
    return importlib.import_module(SCRIPTS[name].stem)


class BareTraining:
    """The same model, shapes and optimizer as a script's, and nothing else."""

    def __init__(self, name: str, checkpoint: Path, text_length: int, resolution: int, precision: str) -> None:
        lora, self.bf16 = name == "lora", precision == "bf16"
        dtype = torch.bfloat16 if lora and self.bf16 else torch.float32
        options = {"subfolder": "transformer", "torch_dtype": dtype}
        self.model = FluxTransformer2DModel.from_pretrained(checkpoint, **options).requires_grad_(not lora).train()
        if lora:
            config = LoraConfig(r=4, lora_alpha=4, target_modules=load_script(name).TRANSFORMER_TARGETS)
            self.model.add_adapter(config)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=1e-4, fused=True)
        side, config = resolution // 16, self.model.config
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3).float()
        text = torch.randn(1, text_length, config.joint_attention_dim, dtype=dtype)
        self.inputs = {
            "hidden_states": torch.randn(1, side**2, config.in_channels),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.ones(1),
            "pooled_projections": torch.randn(1, config.pooled_projection_dim, dtype=dtype),
            "encoder_hidden_states": text,
            "txt_ids": torch.zeros(text_length, 3),
            "img_ids": ids,
        }
        self.target = torch.randn_like(self.inputs["hidden_states"])

    def step(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            velocity = self.model(**self.inputs, return_dict=False)[0]
        torch.nn.functional.mse_loss(velocity.float(), self.target).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def now() -> tuple[float, float]:
    """Seconds of wall and of processor time."""
    return time.perf_counter(), time.process_time()


def compare_steps(args: Namespace, name: str, precision: str, checkpoint: Path, pictures: Path, output: Path) -> None:
    """Alternate a script's steps with bare ones, and print the medians and their ratios."""
    AcceleratorState._reset_state(reset_partial_state=True)
    script = load_script(name)
    bare = BareTraining(name, checkpoint, TEXT_LENGTHS[args.size], args.resolution, precision)
    original, marks = script.log_step, []

    def log_then_step(*values: Any) -> Any:
        logged = original(*values)
        marks.append(now())
        bare.step()
        marks.append(now())
        return logged

    flags = run_flags(checkpoint, pictures, output, args.size, args.steps + 1, args.resolution)
    script.log_step = log_then_step
    try:
        script.main(script.parse_args([*flags, "--cache_latents", f"--mixed_precision={precision}"]))
    finally:
        script.log_step = original
    label = f"{name} {'float32' if precision == 'no' else precision}, {args.resolution} px"
    for kind, times in zip(("wall", "processor"), zip(*marks, strict=True), strict=True):
        spent = [later - earlier for earlier, later in pairwise(times)][1:]  # without the first bare step
        ours, theirs = spent[::2], spent[1::2]
        ratio = median(ours) / median(theirs)
        pairs = " ".join(f"{first:.2f}/{second:.2f}" for first, second in zip(ours, theirs, strict=True))
        print(
            f"{label}, {kind}: {median(ours):.3f} s a step, bare {median(theirs):.3f} s, ratio {ratio:.3f}  ({pairs})"
        )
    sys.stdout.flush()


def peak_of(command: list[str], folder: Path) -> float:
    """The highest resident memory of a command and what it starts, in GiB."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError((folder / "log").read_text()[-2000:])
    return usage.ru_maxrss * 1024 / GIB


def compare_memory(args: Namespace, name: str, precision: str, checkpoint: Path, pictures: Path, output: Path) -> None:
    """Print the peak memory of a script and of its largest stage alone."""
    flags = run_flags(checkpoint, pictures, output, args.size, 2, args.resolution)
    flags += ["--cache_latents", "--report_to=none"]
    ours = peak_of([*launcher(precision, args.threads), str(SCRIPTS[name]), *flags], output.parent)
    code = f"from benchmarks.overhead import BareTraining; from pathlib import Path; bare = BareTraining('{name}', "
    code += (
        f"Path('{checkpoint}'), {TEXT_LENGTHS[args.size]}, {args.resolution}, '{precision}'); bare.step(); bare.step()"
    )
    os.environ["PYTHONPATH"] = str(SCRIPTS[name].parent)
    theirs = peak_of([sys.executable, "-c", code], output.parent)
    label = f"{name} {'float32' if precision == 'no' else precision}"
    print(f"{label}: peak {ours:.2f} GiB, largest stage alone {theirs:.2f} GiB, ratio {ours / theirs:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "medium"], default="medium", help="of the models")
    parser.add_argument("--scripts", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS), help="which to measure")
    parser.add_argument("--precisions", nargs="+", choices=["no", "bf16"], default=["no", "bf16"], help="which")
    parser.add_argument("--what", nargs="+", choices=["time", "memory"], default=["time", "memory"], help="to compare")
    parser.add_argument("--steps", type=int, default=8, help="of each, after one to warm up (default: 8)")
    parser.add_argument("--resolution", type=int, help="in pixels (default: 512, on tiny 32)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--work", type=Path, help="keeps the checkpoint")
    args = parser.parse_args()
    args.resolution = args.resolution or RESOLUTIONS[args.size]
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, pictures = make_inputs(args.work or Path(temporary), args.size)
        for what in args.what:
            for name in args.scripts:
                for precision in args.precisions:
                    compare = compare_steps if what == "time" else compare_memory
                    compare(args, name, precision, checkpoint.resolve(), pictures.resolve(), Path(temporary) / "output")


if __name__ == "__main__":
    main()
