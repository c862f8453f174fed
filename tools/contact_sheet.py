#!/usr/bin/env python
# Copyright 2026 The FLUX DreamBooth authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Put the validation pictures of a run on one sheet, a row a step, a column a picture.

    python tools/contact_sheet.py trained-dog     # reads trained-dog/validation, writes trained-dog/contact_sheet.jpg
    python tools/contact_sheet.py trained-dog --prompts "a photo of sks dog in a bucket" "a photo of a dog"

A training draws each --validation_prompt --num_validation_images times, always in the same order and from the same
noise. Give the prompts in that order, and each stands above its columns.
"""

import argparse
import re
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

STEP_WIDTH, GAP, FONT_SIZE = 64, 2, 16  # pixels: the column with the steps, around each picture, letters
LETTER_WIDTH, LINE_HEIGHT = 9, 20  # pixels, at that size
Files = dict[tuple[int, int], Path]  # by step and number of the picture


def find_pictures(folder: Path) -> Files:
    """The pictures `step_<step>_<number>.png` of a folder; ValueError without any."""
    files = {}
    for path in folder.glob("step_*.png"):
        if match := re.fullmatch(r"step_(\d+)_(\d+)\.png", path.name):
            files[int(match[1]), int(match[2])] = path
    if not files:
        raise ValueError(f"{folder} has no pictures step_<step>_<number>.png; give the folder of a run that drew some")
    return files


def choose_steps(files: Files, rows: int) -> list[int]:
    """At most `rows` steps, the first and the last among them, evenly spread."""
    steps = sorted({step for step, _ in files})
    if len(steps) <= rows:
        return steps
    return [steps[round(row * (len(steps) - 1) / (rows - 1))] for row in range(rows)]


def draw_sheet(files: Files, rows: int = 32, cell: int = 256, prompts: list[str] | None = None) -> Image.Image:
    """The sheet.

    Args:
        rows: how many steps are shown at most; 2 or more.
        cell: side of a picture on the sheet, in pixels.
        prompts: what the columns show, from left to right; of two prompts each has half of the columns.

    Raises:
        ValueError: if the columns cannot be divided by the number of prompts.
        OSError: if a picture cannot be read.
    """
    prompts = prompts or []
    steps = choose_steps(files, rows)
    columns = 1 + max(number for _, number in files)
    if prompts and columns % len(prompts):
        raise ValueError(f"{columns} pictures a step cannot be shared by {len(prompts)} --prompts; give all of them")
    prompt_width = cell * columns // max(1, len(prompts))
    titles = [textwrap.wrap(prompt, max(1, prompt_width // LETTER_WIDTH)) for prompt in prompts]
    top = LINE_HEIGHT * max((len(lines) for lines in titles), default=0)
    sheet = Image.new("RGB", (STEP_WIDTH + columns * cell, top + len(steps) * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, lines in enumerate(titles):
        draw.multiline_text((STEP_WIDTH + number * prompt_width + GAP, 0), "\n".join(lines), "black", font)
    for row, step in enumerate(steps):
        draw.text((STEP_WIDTH - 8, top + (row + 0.5) * cell), str(step), "black", font, anchor="rm")
        for column in range(columns):
            if (step, column) in files:
                with Image.open(files[step, column]) as picture:
                    small = ImageOps.contain(picture.convert("RGB"), (cell - 2 * GAP, cell - 2 * GAP))
                sheet.paste(small, (STEP_WIDTH + column * cell + GAP, top + row * cell + GAP))
    return sheet


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path, help="--output_dir of the training")
    parser.add_argument("--prompts", nargs="+", metavar="PROMPT", help="what the columns show, from left to right")
    parser.add_argument("--rows", type=int, default=32, help="how many steps are shown at most (default: 32)")
    parser.add_argument("--cell", type=int, default=256, help="side of a picture on the sheet (default: 256 pixels)")
    args = parser.parse_args(arguments)
    output = args.output_dir / "contact_sheet.jpg"
    try:
        if args.rows < 2 or args.cell < 16:
            raise ValueError(f"--rows={args.rows} --cell={args.cell}: give at least 2 rows and 16 pixels")
        sheet = draw_sheet(find_pictures(args.output_dir / "validation"), args.rows, args.cell, args.prompts)
        sheet.save(output, quality=92)
        print(f"Wrote {output}: {sheet.width} x {sheet.height} pixels")
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: there is no contact sheet of {args.output_dir}: {error}\n")


if __name__ == "__main__":
    main()
