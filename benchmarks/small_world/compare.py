"""This project's LoRA script beside another one: the same subjects, pictures, seeds and steps, measured alike.

    python -m benchmarks.small_world.compare ../diffusers/examples/dreambooth/train_dreambooth_lora_flux.py

The other script must know the flags of diffusers' DreamBooth scripts, and write a LoRA file or a whole pipeline in
diffusers' format. Only such flags are given to either; what else a script does is its default. Both take the same
class pictures, which this project's script draws in its first run: its seconds are then a little more. The two take
turns, and what has run is not run again.
"""

import argparse
from pathlib import Path

from benchmarks.small_world.table import (
    LORA,
    PICTURES,
    PRIOR,
    SCRIPTS,
    TRAINING_STEPS,
    make_rows,
    measure,
    train,
    world_flags,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other script")
    parser.add_argument("--ours", type=Path, default=SCRIPTS["lora"], help="(default: the LoRA script)")
    parser.add_argument("--folder", type=Path, default=Path("comparison"), help="where runs go (default: comparison)")
    parser.add_argument("--subjects", type=int, default=5, help="(default: 5)")
    parser.add_argument("--seeds", type=int, default=3, help="of each subject (default: 3)")
    parser.add_argument("--steps", type=int, default=TRAINING_STEPS, help=f"(default: {TRAINING_STEPS})")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for both, at the end")
    args = parser.parse_args()

    def run_one(name: str, folder: Path, number: int, seed: int, steps: int) -> dict[str, float]:
        folder = folder.resolve()
        flags = [*world_flags(folder, number, PICTURES, steps, seed), *LORA, *PRIOR, *args.flags]
        flags.remove("--report_to=none")  # which not all know
        for caption in folder.glob("subject-*/*.txt"):  # others take every file there for a picture
            caption.unlink()
        seconds = train((args.ours if name == "ours" else args.other).resolve(), flags, folder)
        return measure(folder / "trained", number, seed) | {"seconds": seconds}

    make_rows(args, ["ours", "other"], run_one)


if __name__ == "__main__":
    main()
