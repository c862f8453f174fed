"""Resident memory of a run over time, stage by stage; draws benchmarks/memory_curve.png. Linux; needs matplotlib.

    python -m benchmarks.memory_curve           # both scripts, `medium` with a T5 nearly as large as the transformer
    python -m benchmarks.memory_curve --trim    # also with glibc's malloc_trim after each stage, to compare

Shows whether the bytes of the text encoders are gone before those of the transformer arrive. Anonymous memory is what
the run itself holds; the rest of the resident memory are pages of files, which the kernel takes back when it needs to.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import random_flux
from benchmarks.run import SCRIPTS, environment, make_inputs, run_flags

random_flux.SIZES["curve"] = random_flux.SIZES["medium"] | {  # T5: 700 MB in float32, the transformer 870 MB
    "t5": {"d_model": 512, "d_ff": 4096, "d_kv": 64, "num_layers": 24, "num_heads": 8}
}
TRIMMED = """
import ctypes, importlib, sys
script = importlib.import_module(sys.argv[1])
original = script.clear_device_cache
script.clear_device_cache = lambda **options: (original(**options), ctypes.CDLL("libc.so.6").malloc_trim(0))
script.main(script.parse_args(sys.argv[2:]))
"""
MIB = 1024**2


class Sample(NamedTuple):
    """Seconds since the launch, and MiB resident."""

    time: float
    total: float
    anonymous: float


class Stage(NamedTuple):
    name: str
    begin: float  # seconds since the launch
    end: float


def read_memory(pid: int, now: float) -> Sample | None:
    """The process's memory, or None when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    kib = dict(re.findall(r"^(VmRSS|RssAnon):\s+(\d+) kB$", status, re.MULTILINE))
    return Sample(now, int(kib["VmRSS"]) / 1024, int(kib["RssAnon"]) / 1024) if len(kib) == 2 else None


def find_stages(lines: list[tuple[float, str]]) -> list[Stage]:
    """The stages by the lines with which the run announces and ends them."""
    begun, stages = {}, []
    for moment, line in lines:
        text = line.rstrip().rpartition(" INFO ")[2]
        ended = re.fullmatch(r"(.+): [\d.]+ s, peak host memory .*", text)
        if ended and ended[1] in begun:
            stages.append(Stage(ended[1], begun[ended[1]], moment))
        begun.setdefault(text, moment)
    return stages


def record(command: list[str], folder: Path) -> tuple[list[Sample], list[Stage]]:
    """Run a command, sampling its memory every 20 ms."""
    samples: list[Sample] = []
    lines: list[tuple[float, str]] = []
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        stderr = process.stderr
        assert stderr is not None
        reader = threading.Thread(target=lambda: lines.extend((time.perf_counter() - start, line) for line in stderr))
        reader.start()
        while process.poll() is None:
            sample = read_memory(process.pid, time.perf_counter() - start)
            samples += [sample] if sample is not None else []
            time.sleep(0.02)
        reader.join()
    if process.returncode:
        raise RuntimeError("".join(line for _, line in lines[-20:]))
    return samples, find_stages(lines)


def at(samples: list[Sample], moment: float) -> Sample:
    """The last sample up to a moment."""
    return [sample for sample in samples if sample.time <= moment][-1]


def report(label: str, samples: list[Sample], stages: list[Stage], text_encoders: float) -> None:
    """Print each stage's peak and what is left at its end, and what is left of the text encoders."""
    before = at(samples, stages[0].begin)
    print(f"{label}: {before.total:,.0f} MiB resident before the text encoders ({before.anonymous:,.0f} anonymous)")
    for stage in stages:
        peak = max(sample.total for sample in samples if stage.begin <= sample.time <= stage.end)
        left = at(samples, stage.end)
        print(
            f"  {stage.name:24} {stage.end - stage.begin:6.1f} s, peak {peak:6,.0f} MiB, at its end {left.total:6,.0f} "
            f"({left.anonymous:,.0f} anonymous)"
        )
    arrives = at(samples, next(stage.begin for stage in stages if stage.name == "Loading the transformer"))
    print(
        f"  when the transformer arrives: {arrives.anonymous - before.anonymous:+,.0f} MiB anonymous, "
        f"{arrives.total - before.total:+,.0f} in all; the text encoders had {text_encoders:,.0f}",
        flush=True,
    )


def draw(curves: dict[str, tuple[list[Sample], list[Stage]]], path: Path) -> None:
    """A panel for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5.5 * len(curves), 4), squeeze=False, sharey=True)
    for axis, (label, (samples, stages)) in zip(axes[0], curves.items(), strict=True):
        times = [sample.time for sample in samples]
        axis.plot(times, [sample.total for sample in samples], color="tab:blue", label="resident")
        axis.plot(times, [sample.anonymous for sample in samples], color="tab:orange", label="of it anonymous")
        for number, stage in enumerate(stages):
            axis.axvspan(stage.begin, stage.end, color="tab:gray", alpha=0.25 if number % 2 else 0.12, linewidth=0)
            middle = (stage.begin + stage.end) / 2
            axis.text(middle, 0.97, stage.name, rotation=90, va="top", ha="center", fontsize=7,
                      transform=axis.get_xaxis_transform())  # fmt: skip
        axis.set(title=label, xlabel="seconds since the launch")
        axis.set_ylim(0, 1.7 * max(sample.total for sample in samples))
        axis.legend(loc="upper left", fontsize=7)
    axes[0][0].set_ylabel("MiB")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse_args() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS), help="which to measure")
    parser.add_argument("--size", choices=list(random_flux.SIZES), default="curve", help="of the models")
    parser.add_argument("--resolution", type=int, default=128, help="in pixels (default: 128)")
    parser.add_argument("--trim", action="store_true", help="measure with malloc_trim after each stage as well")
    parser.add_argument("--work", type=Path, help="keeps the checkpoint")
    parser.add_argument(
        "--picture", default=Path(__file__).with_name("memory_curve.png"), type=Path, help="where to draw"
    )
    return parser.parse_args()


def main() -> None:
    args, curves = parse_args(), {}
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, pictures = (path.resolve() for path in make_inputs(args.work or Path(temporary), args.size))
        parts = [
            file for name in ("text_encoder", "text_encoder_2") for file in (checkpoint / name).glob("*.safetensors")
        ]
        text_encoders = sum(file.stat().st_size for file in parts) / MIB
        flags = run_flags(checkpoint, pictures, Path(temporary) / "output", "medium", 3, args.resolution)
        flags += ["--cache_latents", "--report_to=none"]
        for name in args.scripts:
            command = [sys.executable, str(SCRIPTS[name]), *flags]
            curves[SCRIPTS[name].name] = record(command, SCRIPTS[name].parent)
            report(SCRIPTS[name].name, *curves[SCRIPTS[name].name], text_encoders)
            if args.trim:
                command = [sys.executable, "-c", TRIMMED, SCRIPTS[name].stem, *flags]
                report(f"{SCRIPTS[name].name}, trimmed", *record(command, SCRIPTS[name].parent), text_encoders)
    draw(curves, args.picture)


if __name__ == "__main__":
    main()
