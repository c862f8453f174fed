"""This project's LoRA script beside another one: the same subjects, pictures, seeds and steps, measured alike.

    python -m benchmarks.small_world.compare ../diffusers/examples/dreambooth/train_dreambooth_lora_flux.py

The other script must know the flags of diffusers' DreamBooth scripts, and write a LoRA file or a whole pipeline in
diffusers' format. Only such flags are given to either; what else a script does is its default. Both take the same
class pictures, which this project's script draws in its first run: its seconds are then a little more.
"""

import argparse
from pathlib import Path

from benchmarks.small_world.table import (
    LORA,
    PICTURES,
    PRIOR,
    SCRIPTS,
    TRAINING_STEPS,
    header,
    measure,
    row_of,
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
    print(header(args.subjects, args.seeds, args.steps), end="", flush=True)
    folder = args.folder.resolve()  # with the class pictures that the first script draws, of this world's size
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "other": []}
    for name, script in (("ours", args.ours), ("other", args.other)):
        for number in range(args.subjects):
            for seed in range(args.seeds):
                flags = [*world_flags(folder, number, PICTURES, args.steps, seed), *LORA, *PRIOR, *args.flags]
                flags.remove("--report_to=none")  # which not all know
                for caption in folder.glob("subject-*/*.txt"):  # others take every file there for a picture
                    caption.unlink()
                seconds = train(script.resolve(), flags, folder)
                runs[name].append(measure(folder / "trained", number, seed) | {"seconds": seconds})
        print(row_of(f"{name} ({script.name})", runs[name], runs["ours"]), end="", flush=True)


if __name__ == "__main__":
    main()
