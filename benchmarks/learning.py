"""Proof that both scripts learn, on the tiny random checkpoint; draws benchmarks/learning.png. Needs matplotlib.

    python -m benchmarks.learning

The full script overfits one picture until FluxPipeline, starting from noise, gives that picture's latents back. The
LoRA script lowers the loss, at fixed noise and sigmas, of pictures that it never saw.
"""

import argparse
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from diffusers import FluxPipeline
from PIL import Image

import random_flux
import train_dreambooth_flux
import train_dreambooth_lora_flux

PROMPT = "a photo of sks dog"
TEXT_LENGTH = 16
SIDE = 32  # pixels
FULL_STEPS, LORA_STEPS = 1600, 400


class Point(NamedTuple):
    """What was measured at a step."""

    step: int
    loss: float  # at fixed noise and sigmas
    cosine: float | None  # between what the pipeline draws from noise and the picture, both as latents


def picture_latents(path: Path, vae: Any) -> torch.Tensor:
    """Packed latents (1, L, 4C) of a picture's centre."""
    script, picture = train_dreambooth_flux, train_dreambooth_flux.Picture(path.name, lambda: Image.open(path), ("",))
    args = argparse.Namespace(image_interpolation_mode="lanczos", mask_data_dir=None, alpha_mask=False)
    pixels = script.load_picture(picture, (SIDE, SIDE), args)["pixels"]
    mean = script.encode_pixels(vae, pixels[None])[:, 0]
    return script.pack_latents((mean - vae.config.shift_factor) * vae.config.scaling_factor)


@torch.no_grad()
def sampled_cosine(pipeline: FluxPipeline, target: torch.Tensor, seeds: int = 3) -> float:
    """The lowest cosine between the latents of a picture and what `pipeline` draws from `seeds` different noises."""
    pipeline.set_progress_bar_config(disable=True)
    cosines = []
    for seed in range(seeds):
        drawn = pipeline(
            PROMPT,
            height=SIDE,
            width=SIDE,
            num_inference_steps=28,
            max_sequence_length=TEXT_LENGTH,
            output_type="latent",
            generator=torch.Generator().manual_seed(seed),
        ).images
        cosines.append(torch.cosine_similarity(drawn.flatten(), target.flatten(), dim=0).item())
    return min(cosines)


def run_recorded(script: ModuleType, flags: list[str], target: torch.Tensor | None = None) -> list[Point]:
    """Run a script's main, recording its validation loss, and with `target` what the live transformer draws."""
    points: list[Point] = []
    original = script.validate

    def record(run: Any) -> None:
        loss, cosine = script.validation_loss(run), None
        if target is not None:
            pipeline = FluxPipeline.from_pretrained(
                run.args.pretrained_model_name_or_path,
                transformer=script.unwrap(run.transformer),
            )
            cosine = sampled_cosine(pipeline, target)
        points.append(Point(run.state.step, loss, cosine))

    script.validate = record
    try:
        script.main(script.parse_args(flags))
    finally:
        script.validate = original
    return points


def common_flags(checkpoint: Path, pictures: Path, output: Path, steps: int) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={checkpoint}", f"--instance_data_dir={pictures}", f"--output_dir={output}",
        f"--instance_prompt={PROMPT}", f"--resolution={SIDE}", f"--max_sequence_length={TEXT_LENGTH}", "--center_crop",
        "--cache_latents", "--seed=0", "--report_to=none", "--validation_loss", f"--max_train_steps={steps}",
        "--checkpointing_steps=100000", "--lr_scheduler=cosine", "--lr_warmup_steps=20", "--train_batch_size=4",
    ]  # fmt: skip


def overfit_one_picture(checkpoint: Path, folder: Path, steps: int = FULL_STEPS, points: int = 8) -> list[Point]:
    """The full script on one picture; the last point is what FluxPipeline does with what was saved."""
    picture = random_flux.write_pictures(folder / "one", 1)[0]
    target = picture_latents(picture, FluxPipeline.from_pretrained(checkpoint).vae)
    flags = common_flags(checkpoint, picture.parent, folder / "full", steps)
    flags += ["--repeats=4", "--learning_rate=3e-3", f"--validation_epochs={steps // points}", "--guidance_scale=3.5"]
    recorded = run_recorded(train_dreambooth_flux, flags, target)
    saved = sampled_cosine(FluxPipeline.from_pretrained(folder / "full"), target)
    return [*recorded, Point(steps, float("nan"), saved)]


def train_lora(checkpoint: Path, folder: Path, steps: int = LORA_STEPS, points: int = 8) -> list[Point]:
    """The LoRA script on five pictures, CLIP's adapter included, measured on five others of the same subject."""
    for number, path in enumerate(random_flux.write_pictures(folder / "seen", 10)):
        if number >= 5:
            (folder / "held_out").mkdir(exist_ok=True)
            path.rename(folder / "held_out" / path.name)
    flags = common_flags(checkpoint, folder / "seen", folder / "lora", steps)
    flags += [
        "--rank=16", "--lora_alpha=16", "--learning_rate=5e-3", "--train_text_encoder", "--text_encoder_lr=5e-3",
        f"--validation_data_dir={folder / 'held_out'}", f"--validation_epochs={steps // 2 // points}",
    ]  # fmt: skip
    return run_recorded(train_dreambooth_lora_flux, flags)


def draw(full: list[Point], lora: list[Point], path: Path) -> None:
    """Both curves side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    measured = [point for point in full if point.loss == point.loss]
    left.plot([point.step for point in measured], [point.loss for point in measured], "o-", color="tab:blue")
    left.set(title="full fine-tuning on one picture", xlabel="step", ylabel="loss at fixed noise and sigmas")
    twin = left.twinx()
    twin.plot([point.step for point in full], [point.cosine for point in full], "s-", color="tab:orange")
    twin.set(ylabel="cosine of sampled and true latents", ylim=(-0.3, 1.05))
    left.yaxis.label.set_color("tab:blue")
    twin.yaxis.label.set_color("tab:orange")
    right.plot([point.step for point in lora], [point.loss / lora[0].loss for point in lora], "o-", color="tab:green")
    right.set(title="LoRA, on pictures it never saw", xlabel="step", ylabel="loss / that of the untrained model")
    right.set_ylim(0, 1.05)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default=Path(__file__).with_name("learning.png"), type=Path, help="where to draw")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = random_flux.write_checkpoint(folder / "tiny-flux")
        full, lora = overfit_one_picture(checkpoint, folder), train_lora(checkpoint, folder)
    draw(full, lora, args.picture)
    saved = f"{full[-1].cosine:.3f} saved and loaded after {FULL_STEPS} steps"
    print(f"full: cosine {full[0].cosine:.3f} untrained, {saved}")
    print(f"LoRA: held-out loss x {lora[-1].loss / lora[0].loss:.3f} after {lora[-1].step} steps")


if __name__ == "__main__":
    main()
