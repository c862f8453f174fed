"""Train the small world's FLUX.1: a VAE on its pictures, then a transformer with the full script's flow matching.

    python -m benchmarks.small_world.pretrain small-world --bf16     # a checkpoint of 10.6 MB; 75 minutes on 2 cores

First come things with black and white patterns, then things in all colours, which a model that starts with them learns
poorly. The text encoders are random, with a vocabulary of the world's words: a random T5 gives each word a vector of
its own, and the transformer learns what they mean. Everything is a function of --seed. Needs g++ and Python's headers.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

import random_flux
from benchmarks.small_world import draw
from benchmarks.small_world.measure import TEXT_LENGTH, base_figures, load, truth_figures
from train_dreambooth_flux import StepInputs, sample_sigmas, training_loss  # the pretraining's only use of a script

VAE_STEPS = 8000
STEPS, LR = (12_000, 4000), (1e-3, 7e-4)  # of the transformer, first on ordinary things, then on colourful ones
SHIFT = 1.6  # of the noise levels, as the sampler's for so few tokens
OPTIONS = argparse.Namespace(
    weighting_scheme="none", logit_mean=0.0, logit_std=1.0, mode_scale=1.29, guidance_scale=1.0
)  # of the loss: plain flow matching
MEASURED = 1000  # steps between two measurements on the way
SEEN = 40_000  # pictures that the transformer is trained on; their captions are written anew each time
SMALL: dict[str, dict[str, Any]] = {  # what differs from FLUX.1 [dev]'s configs
    "transformer": {
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 32,
        "num_attention_heads": 6,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "axes_dims_rope": (8, 12, 12),
        "guidance_embeds": True,
    },
    "vae": {"block_out_channels": (8, 16, 32, 48), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64},
    "clip": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4},
    "t5": {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 1, "num_heads": 4},
}


def world_words() -> list[str]:
    """Every word of a caption, sorted."""
    words = ["a", "photo", "of", "facing", *draw.CLASSES, *draw.COLOURS, *draw.SIZES, *draw.FACINGS, *draw.RARE_WORDS]
    return sorted({*words, *" ".join(draw.PLACES.values()).split()})


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with a token for each word of the world: merges join each word from its end."""
    alphabet = sorted(random_flux.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in world_words():
        for index in range(len(word) - 2, -1, -1):
            merges[word[index], word[index + 1 :] + "</w>"] = None
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(left + right for left, right in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """T5's unigram model: a token for each word of the world, and one for each character of other words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0)]
    pieces += [("▁" + word, -2.0) for word in world_words()]
    pieces += [(chr(code), -9.0) for code in range(33, 127)]
    pieces += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    return T5TokenizerFast(vocab=pieces, model_max_length=512)


def write_text_encoders(folder: Path, seed: int) -> None:
    """Write both tokenizers, and both encoders with random weights in bfloat16."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    clip.save_pretrained(folder / "tokenizer")
    t5.save_pretrained(folder / "tokenizer_2")
    sizes = random_flux.CLIP | SMALL["clip"] | {"vocab_size": len(clip), "projection_dim": 64}
    with torch.device("meta"):
        encoders = {
            "text_encoder": CLIPTextModel(CLIPTextConfig(**sizes)),
            "text_encoder_2": T5EncoderModel(T5Config(**random_flux.T5 | SMALL["t5"], vocab_size=len(t5))),
        }
    for number, (name, model) in enumerate(encoders.items()):
        random_flux.write_model(model, folder / name, "model", torch.bfloat16, seed + number)


def to_pixels(pictures: list[np.ndarray]) -> Tensor:
    """Pictures as the VAE takes them: (B, 3, SIDE, SIDE) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine_lr(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """A short warm-up, then a cosine to nothing."""
    peak = optimizer.param_groups[0]["lr"]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, pct_start=0.05, cycle_momentum=False)


def train_vae(steps: int, seed: int, batch: int = 16, lr: float = 4e-3) -> AutoencoderKL:
    """Train a VAE to give pictures back; its latents are kept near a standard normal, loosely.

    Its loss is the mean absolute error plus a little of the Kullback-Leibler divergence, which also makes the decoder
    forgive small errors of the latents. At the end the latents' mean and deviation go into its config.
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng([seed, 10])
    vae = AutoencoderKL(**random_flux.VAE | SMALL["vae"]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0)
    schedule = cosine_lr(optimizer, steps)
    started = time.monotonic()
    for step in range(steps):
        pixels = to_pixels(
            [draw.draw(draw.any_looks(generator), draw.any_scene(generator), generator) for _ in range(batch)]
        )
        posterior = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist
        error = (vae.decode(posterior.sample()).sample - pixels).abs().mean()
        loss = error + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            kl = posterior.kl().mean().item() / posterior.mean[0].numel()
            print(
                f"VAE {step + 1}/{steps}: error {error.item():.4f}, kl {kl:.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / mean.std().item(), shift_factor=mean.mean().item())
    return vae.eval().requires_grad_(False)


def pictures_to_train_on(count: int, seed: int, colourful: bool) -> list[tuple[draw.Looks, draw.Scene]]:
    """Any things in any scenes, but for the combinations that are held out."""
    generator, made = np.random.default_rng([seed, 20]), []
    any_looks = draw.colourful_looks if colourful else draw.ordinary_looks
    while len(made) < count:
        looks, scene = any_looks(generator), draw.ordinary_scene(generator)
        if not draw.is_held_out(looks, scene):
            made.append((looks, scene))
    return made


@torch.no_grad()
def encode_all(vae: AutoencoderKL, things: list[tuple[draw.Looks, draw.Scene]], seed: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents of each picture: (N, C, H, W), scaled as the transformer wants them."""
    generator, means, deviations = np.random.default_rng([seed, 30]), [], []
    for start in range(0, len(things), 64):
        pixels = to_pixels([draw.draw(looks, scene, generator) for looks, scene in things[start : start + 64]])
        posterior = vae.encode(pixels).latent_dist
        means.append((posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor)
        deviations.append(posterior.std * vae.config.scaling_factor)
    return torch.cat(means), torch.cat(deviations)


def any_caption(looks: draw.Looks, scene: draw.Scene, generator: np.random.Generator) -> str:
    """A caption that leaves out what it likes: each attribute in one of four, everything in one of twenty.

    One in eight has a rare word, before things of any looks, so that the word means nothing yet.
    """
    if generator.random() < 0.05:
        return ""
    said = [name for name in ("size", "colour", "facing", "place") if generator.random() < 0.75]
    rare = draw.RARE_WORDS[generator.integers(len(draw.RARE_WORDS))] if generator.random() < 0.125 else ""
    return draw.caption(looks, scene, said, rare)


def new_transformer(seed: int) -> FluxTransformer2DModel:
    """A transformer whose blocks do nothing yet: modulation and output start at zero, which trains faster."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(**random_flux.TRANSFORMER | SMALL["transformer"])
    for name, parameter in transformer.named_parameters():
        if (".linear." in name and "norm" in name) or name.startswith("proj_out"):
            torch.nn.init.zeros_(parameter)
    return transformer


class Guided:
    """A transformer with a guidance of its own for each picture, whatever it is called with."""

    def __init__(self, transformer: Any, guidance: Tensor) -> None:
        self.module, self.guidance = transformer, guidance

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs | {"guidance": self.guidance})


def train_transformer(
    pipeline: FluxPipeline, steps: int, seed: int, bf16: bool, colourful: bool, lr: float, batch: int = 64,
    decay: float = 0.998,
) -> None:  # fmt: skip
    """Train `pipeline.transformer` and leave the moving average of its weights in its place.

    Its guidance input is a random number from 1 to 4, so that it learns to ignore it. It is measured on the way.
    """
    transformer, generator = pipeline.transformer.requires_grad_(True).train(), np.random.default_rng([seed, 40])
    noises = torch.Generator().manual_seed(seed)
    things = pictures_to_train_on(SEEN, seed, colourful)
    means, deviations = encode_all(pipeline.vae, things, seed)
    pipeline.transformer = average = copy.deepcopy(transformer).requires_grad_(False)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0)
    # A scheduler of its own: what is drawn on the way leaves the sampler's few sigmas in the pipeline's.
    sigma_table = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config).sigmas
    schedule, losses = cosine_lr(optimizer, steps), []
    compiled, started = torch.compile(transformer), time.monotonic()  # a quarter faster
    for step in range(steps):
        chosen = generator.integers(len(things), size=batch)
        captions = [any_caption(*things[index], generator) for index in chosen]
        with torch.no_grad():
            embeds, pooled, _ = pipeline.encode_prompt(captions, max_sequence_length=TEXT_LENGTH)
        latents = means[chosen] + deviations[chosen] * torch.randn(means[chosen].shape, generator=noises)
        noise = torch.randn(latents.shape, generator=noises)
        sigmas = sample_sigmas([noises] * batch, sigma_table, OPTIONS, SHIFT)
        guided = Guided(compiled, 1 + 3 * torch.rand(batch, generator=noises))
        inputs = StepInputs(latents, noise, sigmas, embeds, pooled, torch.full((batch,), 1 / batch), OPTIONS)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = training_loss(guided, inputs)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for kept, current in zip(average.parameters(), transformer.parameters(), strict=True):
            kept.lerp_(current.detach(), max(1 - decay, 1 / (step + 1)))
        losses.append(loss.item())
        if step % 100 == 99:
            seconds = time.monotonic() - started
            print(f"transformer {step + 1}/{steps}: loss {np.mean(losses[-100:]):.4f}, {seconds:.0f} s", flush=True)
        if step % MEASURED == MEASURED - 1:
            print(base_figures(pipeline, 50), flush=True)


def assemble(folder: Path, vae: AutoencoderKL, seed: int) -> FluxPipeline:
    """A pipeline in float32: random text encoders (written into `folder`), this VAE, an untrained transformer."""
    write_text_encoders(folder, seed)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**random_flux.SCHEDULER),
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
        tokenizer_2=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        transformer=new_transformer(seed),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    parser.add_argument("--vae", help="folder of a VAE that is trained already")
    parser.add_argument("--vae_steps", type=int, default=VAE_STEPS, help=f"(default: {VAE_STEPS})")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=STEPS, metavar=("ORDINARY", "COLOURFUL"),
        help=f"of the transformer: on ordinary things, then on colourful ones (default: {STEPS})",
    )  # fmt: skip
    parser.add_argument("--transformer", help="folder of one that was trained on the ordinary things")
    parser.add_argument(
        "--bf16", action="store_true", help="the transformer's products in bf16: a quarter faster where the CPU has it"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    args = parser.parse_args()
    torch.compile(torch.nn.Linear(1, 1))(torch.zeros(1, 1))  # without a compiler it fails now, not after the VAE
    started = time.monotonic()
    vae = AutoencoderKL.from_pretrained(args.vae) if args.vae else train_vae(args.vae_steps, args.seed)
    vae.save_pretrained(args.folder / "vae")  # for --vae, should the rest be cut off
    pipeline = assemble(args.folder, vae, args.seed)
    if args.transformer:
        pipeline.transformer = FluxTransformer2DModel.from_pretrained(args.transformer, torch_dtype=torch.float32)
    else:
        train_transformer(pipeline, args.steps[0], args.seed, args.bf16, colourful=False, lr=LR[0])
        pipeline.transformer.save_pretrained(args.folder / "transformer")  # for --transformer
    train_transformer(pipeline, args.steps[1], args.seed + 1, args.bf16, colourful=True, lr=LR[1])
    minutes = (time.monotonic() - started) / 60
    pipeline.to(torch.bfloat16).save_pretrained(args.folder)
    pipeline = load(checkpoint=args.folder)
    figures = {
        "held-out captions": base_figures(pipeline),
        "true pictures through the VAE": truth_figures(pipeline),
        "training": {"minutes": round(minutes, 1), "VAE steps": args.vae_steps, "steps": args.steps, "seed": args.seed},
    }
    (args.folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
