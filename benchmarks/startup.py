"""How long a run takes from its launch to its first step, against bare Python that does what is needed for it.

    python -m benchmarks.startup --pairs 5

The bare program imports what the run needs and loads the same checkpoint: tokenizers, text encoders, VAE, transformer.
Both are started in turn, so that a busy machine slows both. Wall time and processor time are reported, the latter
because it does not depend on what else the machine does.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from benchmarks.run import SCRIPTS, environment, launcher, make_inputs, run_flags

IMPORTS = {  # what each run calls
    "lora": "import accelerate, diffusers, peft, transformers",
    "full": "import accelerate, diffusers, transformers",
}
BARE = """
{imports}
import os, sys, torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
accelerator = Accelerator()
folder = sys.argv[1]
pipeline = FluxPipeline.from_pretrained(folder, transformer=None, vae=None)
vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
print("Training", file=sys.stderr, flush=True)
"""


class Seconds(NamedTuple):
    """From the launch to the line that says that the training begins."""

    wall: float
    processor: float  # of the process and its children, user and system


def time_to_line(command: list[str], folder: Path, end: str = "Training") -> Seconds:
    """Start `command` in `folder` and stop it when a line of its stderr ends in `end`.

    Raises:
        RuntimeError: if it ends without such a line.
    """
    started, lines = time.perf_counter(), []
    with subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if line.rstrip().endswith(end):
                wall, tree = time.perf_counter() - started, psutil.Process(process.pid)
                family = [tree, *tree.children(recursive=True)]
                times = [member.cpu_times() for member in family]
                for member in family:
                    member.kill()
                return Seconds(wall, sum(spent.user + spent.system for spent in times))
    raise RuntimeError(f"{' '.join(command[:4])} ended without {end!r}:\n{''.join(lines[-20:])}")


def measure(name: str, checkpoint: Path, pictures: Path, folder: Path, pairs: int, launched: bool) -> list[float]:
    """The ratios script / bare of wall and of processor time, printed with what they come from."""
    start = launcher("no", 1) if launched else [sys.executable]
    bare = folder / f"bare_{name}.py"
    bare.write_text(BARE.format(imports=IMPORTS[name]))
    flags = [*run_flags(checkpoint, pictures, folder / "out", "tiny", steps=1), "--report_to=none", "--cache_latents"]
    commands = {"script": [*start, str(SCRIPTS[name]), *flags], "bare": [*start, str(bare), str(checkpoint)]}
    for command in commands.values():  # files and bytecode into the caches
        time_to_line(command, folder)
    times: dict[str, list[Seconds]] = {kind: [] for kind in commands}
    for number in range(pairs):
        for kind in list(commands)[:: 1 if number % 2 else -1]:
            times[kind].append(time_to_line(commands[kind], folder))
    ratios = []
    for index, unit in enumerate(Seconds._fields):
        ours, theirs = (median(spent[index] for spent in times[kind]) for kind in commands)
        # The median of the pairs' ratios: a burst of other work then spoils one pair, not the result.
        ratios.append(median(one[index] / other[index] for one, other in zip(*times.values(), strict=True)))
        print(
            f"{name} {'accelerate launch' if launched else 'python'} {unit}: script {ours:.2f} s, bare {theirs:.2f} s, "
            f"ratio {ratios[-1]:.3f}",
            flush=True,
        )
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS), help="which to measure")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--launched", action="store_true", help="start both with `accelerate launch` as well")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the tiny model gains nothing from more
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, pictures = make_inputs(Path(temporary), "tiny")
        for name in args.scripts:
            for launched in (False, True)[: 1 + args.launched]:
                measure(name, checkpoint, pictures, Path(temporary), args.pairs, launched)


if __name__ == "__main__":
    main()
