"""Speed and memory of both scripts, run as users run them. See benchmarks/results.md for what was measured.

    python -m benchmarks.run --size tiny                                   # seconds: that everything works
    python -m benchmarks.run --size medium --precision bf16 --record       # a row for each script in results.md
    python -m benchmarks.run --size medium --scripts lora --against other/train_dreambooth_lora_flux.py
    python -m benchmarks.run --gpu_table --work /scratch --record          # FLUX.1 [dev]'s size on a GPU: 20 rows

Each run is a real `accelerate launch` on a real folder and a checkpoint of random_flux.py (34 GB at FLUX.1 [dev]'s
size, written to `--work` once). Everything is read from the run's own log and event files, so that another script of
the same command line can be measured too. Flags after `--` go to the scripts.
"""

import argparse
import datetime
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

import random_flux
from tools import memory_plan

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_name("results.md")
SCRIPTS = {"lora": ROOT / "train_dreambooth_lora_flux.py", "full": ROOT / "train_dreambooth_flux.py"}
RESOLUTIONS = {"tiny": 32, "medium": 512, "dev": 512}  # pixels
TEXT_LENGTHS = {"tiny": 16, "medium": 77, "dev": 512}  # tokens
GIB = 1024**3
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "4090": 165}  # dense bf16 TFLOP/s, by the maker
GPU_TABLE = {  # the rows, smallest first: pixels, script, dynamo backend, flags
    f"{name}{', compiled' if dynamo != 'no' else ''}, {side} px": (side, script, dynamo, flags)
    for script, dynamo, side, kinds in [
        ("lora", "no", 512, "quantized"), ("lora", "inductor", 512, "quantized"), ("lora", "no", 1024, "quantized"),
        ("lora", "inductor", 1024, "quantized"), ("full", "no", 512, "optimizers"), ("full", "no", 1024, "optimizers"),
    ]
    for name, flags in {
        "quantized": {
            "LoRA, nf4 base": ["--gradient_checkpointing", "--base_quantization=nf4"],
            "LoRA, int8 base": ["--gradient_checkpointing", "--base_quantization=int8"],
            "LoRA, bf16 base": ["--gradient_checkpointing"],
            "LoRA, bf16 base, nothing recomputed": [],
        },
        "optimizers": {
            "full, bf16 fused Adafactor": ["--gradient_checkpointing", "--optimizer=adafactor"],
            "full, bf16 fused 8-bit AdamW": ["--gradient_checkpointing", "--use_8bit_adam"],
        },
    }[kinds].items()
}  # fmt: skip
RESULT_GB = {"lora": 1, "full": 34}  # what a run leaves at FLUX.1 [dev]'s size, until it was read
GPU_FLAGS = {  # of all rows of a script
    "lora": ["--cache_latents", "--rank=16", "--lora_alpha=16"],
    "full": ["--cache_latents", "--full_bf16", "--fused_backward_pass"],
}
COLUMNS = (
    "| run | px | precision | s a step | start-up, s | device, GiB | of all stages | host, GiB | TFLOP a step | MFU "
    "| planned, GiB |"
)


def make_inputs(work: Path, size: str) -> tuple[Path, Path]:
    """A checkpoint of `size` and five pictures in `work`, written once."""
    checkpoint, pictures = work / f"{size}-flux", work / "pictures"
    if not (checkpoint / "model_index.json").is_file():  # the last file written
        random_flux.write_checkpoint(checkpoint, size)
    random_flux.write_pictures(pictures, scale=8)
    return checkpoint, pictures


def run_flags(checkpoint: Path, pictures: Path, output: Path, size: str, steps: int, resolution: int = 0) -> list[str]:
    """The flags of every run; flags that come later win."""
    return [
        f"--pretrained_model_name_or_path={checkpoint}",
        f"--instance_data_dir={pictures}",
        "--instance_prompt=a photo of sks dog",
        f"--output_dir={output}",
        f"--resolution={resolution or RESOLUTIONS[size]}",
        f"--max_sequence_length={TEXT_LENGTHS[size]}",
        f"--max_train_steps={steps}",
        "--train_batch_size=1",
        "--guidance_scale=1",
        "--learning_rate=1e-5",
        "--seed=0",
    ]


def environment() -> dict[str, str]:
    """That of a run: offline, and on the CPU where there is no GPU."""
    values = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | values | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})


def launcher(precision: str, threads: int, dynamo: str = "no") -> list[str]:
    """`accelerate launch` for one process."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    command += [] if torch.cuda.is_available() else ["--cpu"]  # the launcher overwrites the environment's wish
    return [
        *command,
        f"--mixed_precision={precision}",
        f"--dynamo_backend={dynamo}",
        f"--num_cpu_threads_per_process={threads}",
    ]


class Measured(NamedTuple):
    """What a run's own log says."""

    step: float  # seconds: the median after the warm-up
    start_up: float  # seconds from the launch to the end of the first step
    host: float  # GiB, highest, of the process
    device: float | None = None  # GiB, highest in training, where the script logs it
    whole_run: float | None = None  # GiB on the device, highest of all stages


def read_events(folder: Path) -> dict[str, list[Any]]:
    """All scalars of tensorboard's files below `folder`: name to events (wall_time, step, value), by time."""
    events: dict[str, list[Any]] = {}
    for file in folder.rglob("events.out.tfevents.*"):
        accumulator = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in accumulator.Tags()["scalars"]:
            events.setdefault(tag, []).extend(accumulator.Scalars(tag))
    return {tag: sorted(values, key=lambda event: event.wall_time) for tag, values in events.items()}


def read_run(folder: Path, log: str, started: float, usage: Any, warm_up: int) -> Measured:
    """Read a run's event files and log. A step is what lies between the `loss` of two steps, as any script logs it."""
    events = read_events(folder)
    times = [event.wall_time for event in events["loss"]]
    steps = [later - earlier for earlier, later in pairwise(times)][warm_up:]
    peaks = {name: float(peak) for name, peak in re.findall(r"INFO (.+): [\d.]+ s, ([\d.]+) GiB at most", log)}
    host, whole_run = usage.ru_maxrss * 1024 / GIB, max(peaks.values(), default=None)
    return Measured(median(steps), times[0] - started, host, peaks.get("Training"), whole_run)


def run_once(command: list[str], output: Path, warm_up: int) -> Measured:
    """Run a command to its end, read what it left in its output folder, and remove that.

    Raises:
        RuntimeError: if it fails, with the end of its log.
    """
    shutil.rmtree(output, ignore_errors=True)
    with tempfile.TemporaryFile("w+") as log:
        started = time.time()
        process = subprocess.Popen(command, cwd=output.parent, env=environment(), stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read().replace("\r", "\n")
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n" + "\n".join(text.splitlines()[-30:]))
    measured = read_run(output, text, started, usage, warm_up)
    shutil.rmtree(output)
    return measured


def model_flops(size: str, resolution: int, lora_targets: list[str] | None, rank: int = 4) -> float:
    """Floating point operations of a step's forward and backward pass, one picture, nothing computed twice.

    Counted by torch from the shapes alone, with what needs a gradient as in the script: all weights, or only adapters
    on layers whose names end in one of `lora_targets`.
    """
    tokens, config = (resolution // 16) ** 2, random_flux.TRANSFORMER | random_flux.SIZES[size]["transformer"]
    text = (TEXT_LENGTHS[size], config["joint_attention_dim"])
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**config, guidance_embeds=True)
        if lora_targets is not None:
            transformer.requires_grad_(False)
            transformer.add_adapter(LoraConfig(r=rank, target_modules=lora_targets))
        with FlopCounterMode(display=False) as counter:
            transformer(
                hidden_states=torch.empty(1, tokens, config["in_channels"]),
                timestep=torch.empty(1),
                guidance=torch.empty(1),
                pooled_projections=torch.empty(1, config["pooled_projection_dim"]),
                encoder_hidden_states=torch.empty(1, *text),
                txt_ids=torch.empty(text[0], 3),
                img_ids=torch.empty(tokens, 3),
                return_dict=False,
            )[0].sum().backward()
    return float(counter.get_total_flops())


class Plan(NamedTuple):
    """A row to measure."""

    name: str
    script: str  # a key of SCRIPTS
    resolution: int
    precision: str = "no"
    dynamo: str = "no"
    flags: tuple[str, ...] = ()

    def command(self, args: Namespace, checkpoint: Path, pictures: Path, script: Path | None = None) -> list[str]:
        """The run of this row, or the same with another script."""
        flags = run_flags(checkpoint, pictures, args.output, args.size, args.steps, self.resolution)
        start = launcher(self.precision, args.threads, self.dynamo)
        flags += [f"--mixed_precision={self.precision}", "--report_to=tensorboard", *self.flags, *args.extra]
        return [*start, str(script or SCRIPTS[self.script]), *flags]


def make_plans(args: Namespace) -> Iterator[Plan]:
    """The rows that the flags ask for."""
    if not args.gpu_table:
        for script in args.scripts:
            yield Plan(script, script, args.resolution, args.precision, args.dynamo, ("--cache_latents",))
        return
    for name, (resolution, script, dynamo, flags) in GPU_TABLE.items():
        if re.search(args.only, name):
            yield Plan(name, script, resolution, "bf16", dynamo, (*GPU_FLAGS[script], *flags))


def lora_targets(plan: Plan) -> list[str] | None:
    """The layers with adapters, as the LoRA script has them, or None for the full one."""
    if plan.script == "full":
        return None
    from train_dreambooth_lora_flux import TRANSFORMER_TARGETS

    return TRANSFORMER_TARGETS


def table_row(args: Namespace, plan: Plan, measured: Measured) -> str:
    ranks = [flag.split("=")[1] for flag in plan.flags if flag.startswith("--rank=")]
    flops = model_flops(args.size, plan.resolution, lora_targets(plan), int((ranks or ["4"])[-1]))
    usage = f"{flops / measured.step / args.peak_tflops / 1e12:.1%}" if args.peak_tflops else "-"
    numbers = [measured.step, measured.start_up, measured.device, measured.whole_run, measured.host, flops / 1e12]
    cells = ["-" if number is None else f"{number:.3g}" for number in numbers]
    planned = f"{planned_memory(args, plan):.3g}"
    cells = ["|", plan.name, str(plan.resolution), plan.precision, *cells, usage, planned, "|"]
    return " | ".join(cells).replace("| |", "|")


def planned_memory(args: Namespace, plan: Plan) -> float:
    """GiB on the device in training, by the memory plan."""
    script = memory_plan.load_script(str(SCRIPTS[plan.script]))
    inputs = (args.work / f"{args.size}-flux", args.work / "pictures", args.output)
    flags = run_flags(*inputs, args.size, args.steps, plan.resolution)
    given = script.parse_args([*flags, f"--mixed_precision={plan.precision}", *plan.flags, *args.extra])
    models = random_flux.make_meta_models(args.size)
    return memory_plan.plan_stages(memory_plan.Plan(script, given, models))["training"].total / GIB


def describe_machine() -> str:
    """Date, hardware and versions."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
            break
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "accelerate"))
    hardware = f"{gpu}, {os.cpu_count()} cores of {cpu}"
    return f"{datetime.date.today()}; {hardware}; Python {platform.python_version()}, {packages}"


def compare(args: Namespace, plan: Plan, checkpoint: Path, pictures: Path) -> None:
    """Run the script and `--against` in turn, and print the ratios of their medians."""
    scripts, pairs = {"ours": None, "theirs": args.against.resolve()}, []
    for number in range(args.rounds):
        pair = {}
        for kind in list(scripts)[:: 1 if number % 2 else -1]:
            command = plan.command(args, checkpoint, pictures, scripts[kind])
            pair[kind] = run_once(command, args.output, args.warm_up)
            print(f"{plan.name} {kind}: {pair[kind]}", flush=True)
        pairs.append(pair)
    for field in ("step", "start_up", "host", "device"):
        both = [[getattr(pair[kind], field) for kind in scripts] for pair in pairs]
        if None not in (both[0]):
            print(f"{plan.name} {field}: ours / theirs {median(ours / theirs for ours, theirs in both):.3f}")


def run_all(args: Namespace, checkpoint: Path, pictures: Path) -> int:
    """Measure every row, print it, and with `--record` write it; returns the number of rows that failed."""
    head = f"\n## {args.size}, {describe_machine()}\n\n`{args.invoked}`\n\n{COLUMNS}\n|" + "---|" * (
        COLUMNS.count("|") - 1
    )
    print(head, flush=True)
    failed = 0
    for plan in make_plans(args):
        free = shutil.disk_usage(args.output.parent).free // 10**9
        if args.size == "dev" and free < RESULT_GB[plan.script]:
            print(f"{plan.name}: left out, its result needs {RESULT_GB[plan.script]} GB and the disk has {free}")
            continue
        try:
            command = plan.command(args, checkpoint, pictures)
            row = table_row(args, plan, run_once(command, args.output, args.warm_up))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed += 1
            continue
        print(row, flush=True)
        if args.record:
            with RESULTS.open("a") as file:
                file.write((head + "\n" if head else "") + row + "\n")
            head = ""
    return failed


def parse_args(argv: list[str]) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(random_flux.SIZES), default="tiny", help="of the models")
    parser.add_argument("--scripts", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS), help="which to measure")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="mixed precision")
    parser.add_argument("--dynamo", default="no", help="accelerate launch's --dynamo_backend")
    parser.add_argument("--resolution", type=int, help="in pixels (default: 32 on tiny, else 512)")
    parser.add_argument("--steps", type=int, default=12, help="of each run (default: 12)")
    parser.add_argument("--warm_up", type=int, default=3, help="steps after the first that do not count (default: 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a run (default: all cores)")
    parser.add_argument("--work", type=Path, help="keeps the checkpoint (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="of a run, until it is read: up to 34 GB (default: in --work)")
    parser.add_argument("--against", type=Path, help="another script of the same command line, run in turn with ours")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each with --against (default: 3)")
    parser.add_argument("--gpu_table", action="store_true", help="all rows of the GPU's table, at size dev")
    parser.add_argument("--only", default="", metavar="REGEX", help="of that table only these rows, as 'nf4'")
    parser.add_argument("--peak_tflops", type=float, help="of the GPU, dense bf16 (default: by its name)")
    parser.add_argument("--record", action="store_true", help="append what is measured to benchmarks/results.md")
    parser.add_argument("extra", nargs="*", help="after --: flags for the scripts")
    args = parser.parse_args(argv)
    args.invoked = shlex.join(["python", "-m", "benchmarks.run", *argv])
    if args.gpu_table:
        args.size = "dev"
        if not torch.cuda.is_available():
            parser.error("--gpu_table needs a GPU, and torch finds none here; nothing was measured or written")
    if args.size == "dev" and args.work is None:
        parser.error("--size dev writes 34 GB: say where with --work FOLDER")
    if args.against and len(args.scripts) > 1:
        parser.error("--against is compared with one script: give --scripts lora or --scripts full")
    if args.steps < args.warm_up + 2:
        parser.error(f"--steps is {args.steps}; give at least {args.warm_up + 2}, so that a step is left to measure")
    args.resolution = args.resolution or RESOLUTIONS[args.size]
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        args.peak_tflops = args.peak_tflops or next((peak for known, peak in PEAKS.items() if known in name), None)
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        args.work = (args.work or Path(temporary)).resolve()
        args.output = (args.output or args.work).resolve() / "output"
        args.output.parent.mkdir(parents=True, exist_ok=True)
        checkpoint, pictures = make_inputs(args.work, args.size)
        if args.against is None:
            return min(1, run_all(args, checkpoint, pictures))
        for plan in make_plans(args):
            compare(args, plan, checkpoint, pictures)
        return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
