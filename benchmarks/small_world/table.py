"""How well does it teach? One row a way of training: several subjects and seeds, mean and spread of every score.

    python -m benchmarks.small_world.table teaching                         # all rows: hours on 2 cores
    python -m benchmarks.small_world.table teaching --rows LoRA 'LoRA, masks'
    python -m benchmarks.small_world.table --list                           # the rows and their flags

Every run is appended to teaching/runs.jsonl as it ends: started again, it goes on where it was stopped. All rows train
on as many pictures: four in each of --steps, or one in each of 2,000 steps.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.small_world import draw
from benchmarks.small_world.measure import CHECKPOINT, RARE_WORD, TEXT_LENGTH, Readings, load, read_model, score

ROOT = Path(__file__).parents[2]
SCRIPTS = {"lora": ROOT / "train_dreambooth_lora_flux.py", "full": ROOT / "train_dreambooth_flux.py"}
TRAINING_STEPS = 500
PICTURES = 5
Runs = dict[tuple[int, int], dict[str, float]]  # by subject and seed
SCORES = ["fidelity", "seen_fidelity", "prompt", "preservation", "diversity"]
PAIRED = ["fidelity", "preservation"]  # also compared with the first row's, run by run
COMMON = [
    "--train_batch_size=4", "--repeats=4",  # five pictures alone would make every other step one of a single picture
    "--guidance_scale=1", "--center_crop", "--lr_scheduler=constant",  # not mirrored, as the places never are
]  # fmt: skip
LAYERS = Path(__file__).with_name("layers.txt").read_text().splitlines()[1]  # a flag; the demo has it too
LORA = [*COMMON, "--rank=16", "--lora_alpha=16", "--learning_rate=1e-3", LAYERS]
FULL = [*COMMON, "--learning_rate=3e-4"]
PRIOR = ["--with_prior_preservation", "--num_class_images=48", "--sample_batch_size=48"]
BASE = ["--prior_from_base_model", f"--trigger_word={RARE_WORD} KIND", "--class_word=a KIND"]
CAPTIONS = ["--caption_extension=.txt"]  # which say the place
ONE = [*LORA, *BASE, *CAPTIONS, "--train_batch_size=1", "--max_train_steps=2000", "--learning_rate=5e-4"]
OWN = ["--skip_final_inference", "--checkpointing_steps=100000"]  # not known to other scripts

ROWS: dict[str, tuple[str, list[str], int]] = {  # name: script, its flags, pictures of the subject; later flags win
    "LoRA": ("lora", [*LORA, *BASE, *CAPTIONS], PICTURES),
    "LoRA, no prior": ("lora", [*LORA, *CAPTIONS], PICTURES),
    "LoRA, one class prompt": ("lora", [*LORA, "--prior_from_base_model", *CAPTIONS], PICTURES),
    "LoRA, class pictures": ("lora", [*LORA, *PRIOR, *CAPTIONS], PICTURES),
    "LoRA, prior in half of the steps": ("lora", [*LORA, *BASE, *CAPTIONS, "--prior_share=0.5"], PICTURES),
    "LoRA, prior in a quarter": ("lora", [*LORA, *BASE, *CAPTIONS, "--prior_share=0.25"], PICTURES),
    "LoRA, one picture a step": ("lora", ONE, PICTURES),
    "LoRA, one picture a step, prior in half": ("lora", [*ONE, "--prior_share=0.5"], PICTURES),
    "LoRA, one picture a step, prior in a quarter": ("lora", [*ONE, "--prior_share=0.25"], PICTURES),
    "LoRA, a prior of 0.3": ("lora", [*LORA, *BASE, *CAPTIONS, "--prior_loss_weight=0.3"], PICTURES),
    "LoRA, mirrored": ("lora", [*LORA, *BASE, *CAPTIONS, "--random_flip"], PICTURES),
    "LoRA, no captions": ("lora", [*LORA, *BASE], PICTURES),
    "LoRA, masks": ("lora", [*LORA, *BASE, *CAPTIONS, "--mask_data_dir=MASKS"], PICTURES),
    "LoRA, 20 pictures": ("lora", [*LORA, *BASE, *CAPTIONS], 20),
    "LoRA, the default layers": ("lora", [*LORA[:-1], *BASE, *CAPTIONS], PICTURES),
    "LoRA, rank 4": ("lora", [*LORA, *BASE, *CAPTIONS, "--rank=4", "--lora_alpha=4"], PICTURES),
    "LoRA, Prodigy": ("lora", [*LORA, *BASE, *CAPTIONS, "--optimizer=prodigy", "--learning_rate=1"], PICTURES),
    "LoRA, 20 pictures, logit-normal": ("lora", [*LORA, *BASE, *CAPTIONS, "--weighting_scheme=logit_normal"], 20),
    "LoRA, logit-normal": ("lora", [*LORA, *BASE, *CAPTIONS, "--weighting_scheme=logit_normal"], PICTURES),
    "LoRA, shift 2.5": ("lora", [*LORA, *BASE, *CAPTIONS, "--flow_shift=2.5"], PICTURES),
    "LoRA, CLIP too": ("lora", [*LORA, *BASE, *CAPTIONS, "--train_text_encoder", "--text_encoder_lr=1e-3"], PICTURES),
    "LoRA, bf16": ("lora", [*LORA, *BASE, *CAPTIONS, "--mixed_precision=bf16"], PICTURES),
    "LoRA, int8 base": ("lora", [*LORA, *BASE, *CAPTIONS, "--base_quantization=int8"], PICTURES),
    "LoRA, nf4 base": ("lora", [*LORA, *BASE, *CAPTIONS, "--base_quantization=nf4"], PICTURES),
    "full, class pictures": ("full", [*FULL, *PRIOR, *CAPTIONS], PICTURES),
    "full, no prior": ("full", [*FULL, *CAPTIONS], PICTURES),
}


def world_flags(folder: Path, number: int, count: int, steps: int, seed: int) -> list[str]:
    """Flags of a run in this world on `count` pictures of subject `number`, as any script of this family has them."""
    pictures, kind = folder / f"subject-{number}-{count}", draw.subject_looks(number).kind
    draw.write_subject(pictures, number, count)
    return [
        f"--pretrained_model_name_or_path={CHECKPOINT}", f"--instance_data_dir={pictures}",
        f"--instance_prompt=a photo of {RARE_WORD} {kind}", f"--class_prompt=a photo of a {kind}",
        f"--class_data_dir={folder / f'class-{kind}-{seed}'}", f"--output_dir={folder / 'trained'}",
        f"--resolution={draw.SIDE}", f"--max_sequence_length={TEXT_LENGTH}", f"--max_train_steps={steps}",
        f"--seed={seed}", "--report_to=none",
    ]  # fmt: skip


def train(script: Path, flags: list[str], folder: Path) -> float:
    """Run a script, which writes into `folder`/trained, and return its seconds.

    Raises:
        RuntimeError: if it fails, with the end of what it said.
    """
    shutil.rmtree(folder / "trained", ignore_errors=True)
    started = time.monotonic()
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(script), *flags], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script.name} {' '.join(flags)}\n{done.stderr[-3000:]}")
    return time.monotonic() - started


@cache
def read_base(number: int, seed: int) -> Readings:
    return read_model(load(), number, seed)


def measure(trained: Path | None, number: int, seed: int) -> dict[str, float]:
    """The scores of what was trained on subject `number`, or of the base."""
    model = read_model(load(trained), number, seed)
    return score(number, model, read_base(number, 1000), read_base(number, 1001))


def run_row(name: str, folder: Path, number: int, seed: int, steps: int) -> dict[str, float]:
    """Train and measure one row's way on one subject with one seed."""
    script, flags, count = ROWS[name]
    flags = [*world_flags(folder, number, count, steps, seed), *OWN, *flags]
    pictures, prompt = "--with_prior_preservation" in flags, {"--prior_from_base_model", BASE[-1]} & {*flags}
    needless = [] if pictures else ["--class_data_dir"]
    needless += [] if pictures or prompt == {"--prior_from_base_model"} else ["--class_prompt"]
    flags = [flag.replace("MASKS", str(folder / f"subject-{number}-{count}-masks")) for flag in flags]
    flags = [flag.replace("KIND", draw.subject_looks(number).kind) for flag in flags]
    flags = [flag for flag in flags if flag.split("=")[0] not in needless]
    seconds = train(SCRIPTS[script], flags, folder)
    return measure(folder / "trained", number, seed) | {"seconds": round(seconds, 1)}


def row_of(name: str, runs: Runs, first: Runs) -> str:
    """A line of the table: number of runs, mean and standard deviation of each score, what is more than `first`'s.

    That is the mean over the subjects of the difference to runs of the same subject and seed, and its standard error.
    Last come the seconds, their median.
    """
    cells = [str(len(runs))]
    for column in SCORES:
        values = [run[column] for run in runs.values()]
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.2f}{spread}")
    for column in PAIRED:
        gains: dict[int, list[float]] = {}
        for subject, seed in runs.keys() & first.keys():
            gains.setdefault(subject, []).append(runs[subject, seed][column] - first[subject, seed][column])
        means = [np.mean(values) for values in gains.values()]
        spread = f" ± {np.std(means, ddof=1) / np.sqrt(len(means)):.2f}" if len(means) > 1 else ""
        cells.append(f"{np.mean(means):+.2f}{spread}" if means else "")
    cells.append(f"{np.median([run['seconds'] for run in runs.values()]):.0f}")
    return f"| {name} | {' | '.join(cells)} |\n"


def header() -> str:
    columns = ["runs", *(name.replace("_", " ") for name in SCORES), *(f"more {name}" for name in PAIRED), "seconds"]
    return f"| | {' | '.join(columns)} |\n|---{'|---:' * len(columns)}|\n"


def read_runs(log: Path, steps: int) -> dict[str, Runs]:
    """The runs of so many steps that a `runs.jsonl` holds, by row; none if there is no such file."""
    found: dict[str, Runs] = {}
    for line in map(json.loads, log.read_text().splitlines() if log.exists() else []):
        if line["steps"] == steps:
            found.setdefault(line["row"], {})[line["subject"], line["seed"]] = line["scores"]
    return found


def make_rows(args: argparse.Namespace, names: list[str], run_one: Callable[..., dict[str, float]] = run_row) -> None:
    """Do every run that `runs.jsonl` lacks, all rows in turn, and write the table anew after each subject."""
    args.folder.mkdir(parents=True, exist_ok=True)
    log = args.folder / "runs.jsonl"
    done = {name: Runs() for name in names} | read_runs(log, args.steps)
    for seed, number in itertools.product(range(args.seeds), range(args.subjects)):
        for name in names:
            if (number, seed) not in (runs := done[name]):
                runs[number, seed] = run_one(name, args.folder, number, seed, args.steps)
                line = {"row": name, "subject": number, "seed": seed, "steps": args.steps, "scores": runs[number, seed]}
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        first = done.get(next(iter(ROWS)), done[names[0]])
        rows = [row_of(name, runs, first) for name, runs in done.items()]
        (args.folder / f"table-{args.steps}.md").write_text(header() + "".join(rows))
    print((args.folder / f"table-{args.steps}.md").read_text(), end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("teaching"), help="where everything goes")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help="names of rows (default: all)")
    parser.add_argument("--list", action="store_true", help="print the rows and their flags, and stop")
    parser.add_argument("--subjects", type=int, default=5, help="(default: 5)")
    parser.add_argument("--seeds", type=int, default=3, help="of each subject (default: 3)")
    parser.add_argument("--steps", type=int, default=TRAINING_STEPS, help=f"(default: {TRAINING_STEPS})")
    args = parser.parse_args()
    if args.list:
        for name, (script, flags, count) in ROWS.items():
            print(f"{name}: {SCRIPTS[script].name} {' '.join(flags)}, {count} pictures")
        return
    make_rows(args, args.rows or list(ROWS))


if __name__ == "__main__":
    main()
