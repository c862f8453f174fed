"""What a training looks like on a terminal, as a picture: `python -m benchmarks.terminal` (two minutes).

A short run of the LoRA script on the tiny random checkpoint, on a pseudo-terminal, drawn while it trains and
after it ended. What libraries say of this machine is left out. contact_sheet.jpg is of a run of the full script that
overfits one picture (half size; the VAE is random too, so the picture that all noises come to is not a dog).
"""

import fcntl
import os
import pty
import re
import struct
import sys
import tempfile
import termios
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import random_flux
from benchmarks import learning

ROOT = Path(__file__).parent.parent
COLUMNS, LINES = 124, 60


def screen(printed: str) -> list[str]:
    """The lines that a terminal shows after `printed`: carriage returns write over, `ESC [ A` goes up."""
    lines, row, column = [""], 0, 0
    for part in re.split(r"(\r|\n|\x1b\[\d*[A-Za-z])", printed):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b["):
            row -= int(part[2:-1] or 1) if part.endswith("A") else 0
        else:
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def run_on_terminal(command: list[str], folder: Path) -> str:
    """What `command` prints on a terminal of its own."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        os.execv(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    printed = b""
    try:
        while part := os.read(terminal, 65536):
            printed += part
    except OSError:  # Linux ends a terminal so
        pass
    _, status = os.waitpid(pid, 0)
    text = printed.decode().replace("\r\n", "\n")
    if status:
        raise RuntimeError(text)
    return text


def draw(lines: list[str]) -> Image.Image:
    """Lines of text as a terminal's window."""
    font = ImageFont.truetype(find_font(), 14)
    width, height = int(font.getlength("m") * COLUMNS) + 24, 19 * len(lines) + 24
    picture = Image.new("RGB", (width, height), "#1e1e2e")
    pen = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        colour = "#f9e2af" if "%|" in line else "#cdd6f4"
        pen.text((12, 12 + 19 * row), line, colour, font)
    return picture.quantize(16)


def find_font() -> str:
    """A fixed-width font of this machine."""
    names = ("DejaVuSansMono.ttf", "LiberationMono-Regular.ttf", "Menlo.ttc", "consola.ttf")
    for name in names:
        try:
            ImageFont.truetype(name, 14)
        except OSError:
            continue
        return name
    raise FileNotFoundError(f"none of {', '.join(names)} is installed")


def draw_sheet(folder: Path) -> None:
    """The contact sheet of the overfitting run of benchmarks/learning.py."""
    checkpoint = random_flux.write_checkpoint(folder / "tiny-flux")
    picture = random_flux.write_pictures(folder / "one", 1)[0]
    flags = learning.common_flags(checkpoint, picture.parent, folder / "full", learning.FULL_STEPS)
    flags += ["--repeats=4", "--learning_rate=3e-3", "--validation_steps=400", "--skip_final_inference"]
    flags += ["--validation_prompt=a photo of sks dog", "--validation_prompt=a painting of a cat"]
    script = learning.train_dreambooth_flux
    script.main(script.parse_args([*flags, "--num_validation_images=2", "--validation_epochs=2000"]))
    with Image.open(folder / "full" / script.SHEET_FILE) as sheet:
        half = sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)
    half.save(Path(__file__).with_name("contact_sheet.jpg"), quality=85)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        draw_sheet(Path(name))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_flux.write_checkpoint(folder / "tiny-flux")
        random_flux.write_pictures(folder / "dog")
        command = [
            sys.executable, str(ROOT / "train_dreambooth_lora_flux.py"), "--pretrained_model_name_or_path=tiny-flux",
            "--instance_data_dir=dog", "--instance_prompt=a photo of sks dog", "--output_dir=trained-flux-lora",
            "--resolution=64", "--train_batch_size=1", "--max_train_steps=200", "--learning_rate=1e-3", "--rank=16",
            "--lora_alpha=16", "--checkpointing_steps=100", "--validation_prompt=a photo of sks dog in a bucket",
            "--validation_steps=50", "--num_validation_images=1", "--seed=0",
        ]  # fmt: skip
        printed = run_on_terminal(command, folder)
    bars = [match.end() for match in re.finditer(r"step 1[45]\d/200[^\r\n]*", printed)]
    lines = [line for line in screen(printed[: bars[-1]]) if re.match(r"\d\d:\d\d:\d\d |.*%\|", line)]
    lines += ["", "… and when it has ended:", "", *screen(printed)[-19:]]
    print("\n".join(lines))
    draw([line[:COLUMNS] for line in lines]).save(Path(__file__).with_name("terminal.png"), optimize=True)


if __name__ == "__main__":
    main()
