#!/usr/bin/env python
# Copyright 2026 The FLUX DreamBooth authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Write a FLUX.1 checkpoint with random weights, and a few pictures to train on. Nothing is downloaded.

    python random_flux.py tiny-flux --pictures tiny-flux-pictures        # a few MB, for tests
    python random_flux.py dev-flux --size dev                            # FLUX.1 [dev]'s shapes, 34 GB in bfloat16
    python random_flux.py tiny-schnell --no_guidance_embeds              # like FLUX.1 [schnell]

The folder is what `FluxPipeline.from_pretrained` takes, tokenizers and scheduler included. Weights are
drawn tensor by tensor and written shard by shard: the memory needed is that of one shard, not of the checkpoint.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from huggingface_hub import split_torch_state_dict_into_shards
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

# Only what differs between the sizes stands here; everything else of the configs is FLUX.1 [dev]'s.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "dtype": torch.float32,
        "transformer": {
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8),
        },
        "vae": {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
        "clip": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "t5": {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4},
        "vocabularies": {"clip": 514, "t5": 256},
    },
    "medium": {  # about 200 M transformer parameters: large enough to time on a CPU
        "dtype": torch.float32,
        "transformer": {
            "num_layers": 4,
            "num_single_layers": 8,
            "attention_head_dim": 64,
            "num_attention_heads": 14,
            "joint_attention_dim": 512,
            "pooled_projection_dim": 256,
            "axes_dims_rope": (8, 28, 28),
        },
        "vae": {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1},
        "clip": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
        "t5": {"d_model": 512, "d_ff": 1024, "d_kv": 64, "num_layers": 4, "num_heads": 8},
        "vocabularies": {"clip": 49408, "t5": 32128},
    },
    "dev": {
        "dtype": torch.bfloat16,
        "transformer": {},
        "vae": {},
        "clip": {},
        "t5": {},
        "vocabularies": {"clip": 49408, "t5": 32128},
    },
}

TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,  # as in the published config: the pooled vector is read where the token id is highest
    "pad_token_id": 1,
}
T5 = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "is_encoder_decoder": True,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
PICTURE_SIZES = [(96, 64), (64, 96), (80, 80), (128, 72), (60, 90)]  # (width, height): landscape, portrait, square


def draw_normal(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator, std: float = 1.0) -> torch.Tensor:
    """Drawn where the generator is, returned on the CPU."""
    return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device).mul_(std).cpu()


def random_tensor(name: str, meta: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A weight of `meta`'s shape: norms at one, biases at zero, the rest normal with variance 1 / fan-in.

    The VAE's last encoder layer gives mean and log-variance; it is made so that, as in a trained VAE, the latents have
    a deviation of about 1 after scaling and the posterior is narrow.
    """
    if name.startswith("encoder.conv_out."):
        mean, log_variance = torch.zeros(meta.shape).chunk(2)
        if name.endswith("bias"):
            log_variance -= 8
        else:
            mean = draw_normal(mean.shape, mean.dtype, generator, 5 * math.prod(meta.shape[1:]) ** -0.5)
        return torch.cat([mean, log_variance]).to(dtype)
    if name.endswith("bias"):
        return torch.zeros(meta.shape, dtype=dtype)
    if meta.ndim < 2:
        return torch.ones(meta.shape, dtype=dtype)
    if "embed_tokens" in name or "shared" in name or "embedding" in name:
        return draw_normal(meta.shape, dtype, generator)
    return draw_normal(meta.shape, dtype, generator, math.prod(meta.shape[1:]) ** -0.5)


def write_model(
    model: Any, folder: Path, stem: str, dtype: torch.dtype, seed: int, max_shard_size: str = "4GB",
    device: str = "cpu",
) -> None:  # fmt: skip
    """Write config and random weights of a model that lives on the meta device.

    Args:
        model: a diffusers or transformers model on the meta device, which names the tensors and their shapes.
        folder: where it goes; made if need be.
        stem: the weights' file name without its ending, "diffusion_pytorch_model" or "model".
        dtype: of the weights written.
        seed: of the weights.
        max_shard_size: the memory that writing takes, and the size of a file.
        device: where the weights are drawn; on another one they are others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_config"):
        model.save_config(folder)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.dtype = dtype
        model.config.save_pretrained(folder)
    shapes = {name: torch.empty_like(tensor, dtype=dtype) for name, tensor in model.named_parameters()}
    plan = split_torch_state_dict_into_shards(
        shapes, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=max_shard_size
    )
    generator = torch.Generator(device).manual_seed(seed)
    with tqdm(total=len(shapes), desc=f"Writing {folder.name}", unit="tensor", leave=False, disable=None) as progress:
        for file, names in plan.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = random_tensor(name, shapes[name], dtype, generator)
                progress.update()
            save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE without merges: one token a byte, so that any two prompts differ."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """T5's unigram model over printable ASCII, one token a character; <pad> 0, </s> 1 and <unk> 2 as in T5."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    pieces += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    return T5TokenizerFast(vocab=pieces, model_max_length=512)


def make_meta_models(size: str, guidance_embeds: bool = True) -> dict[str, Any]:
    """The models of a checkpoint on the meta device, which have shapes but no weights, by component.

    Raises:
        ValueError: if `size` is not one of SIZES.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    sizes, vocabularies = SIZES[size], SIZES[size]["vocabularies"]
    transformer = TRANSFORMER | sizes["transformer"]
    clip = CLIP | sizes["clip"] | {"vocab_size": vocabularies["clip"]}
    with torch.device("meta"):
        return {
            "transformer": FluxTransformer2DModel(**transformer, guidance_embeds=guidance_embeds),
            "vae": AutoencoderKL(**VAE | sizes["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**clip, projection_dim=clip["hidden_size"])),
            "text_encoder_2": T5EncoderModel(T5Config(**T5 | sizes["t5"], vocab_size=vocabularies["t5"])),
        }


def write_checkpoint(folder: str | Path, size: str = "tiny", guidance_embeds: bool = True, seed: int = 0) -> Path:
    """Write a random FLUX.1 checkpoint in diffusers' format.

    Args:
        folder: where it goes; files of the same name are replaced.
        size: a key of SIZES.
        guidance_embeds: True like FLUX.1 [dev], False like FLUX.1 [schnell].
        seed: of the weights.

    Returns:
        The folder.

    Raises:
        ValueError: if `size` is not one of SIZES.
    """
    models, folder, dtype = make_meta_models(size, guidance_embeds), Path(folder), SIZES[size]["dtype"]
    device = "cuda" if size == "dev" and torch.cuda.is_available() else "cpu"  # one minute instead of several
    for number, (name, model) in enumerate(models.items()):
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        write_model(model, folder / name, stem, dtype, seed + number, device=device)
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    t5_tokenizer().save_pretrained(folder / "tokenizer_2")
    scheduler = SCHEDULER if guidance_embeds else SCHEDULER | {"shift": 1.0, "use_dynamic_shifting": False}
    FlowMatchEulerDiscreteScheduler(**scheduler).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def write_pictures(folder: str | Path, count: int = len(PICTURE_SIZES), scale: int = 1) -> list[Path]:
    """Draw the same toy dog in `count` scenes of different sizes and orientations.

    Args:
        folder: where the PNG files go; made if need be.
        count: how many; the sizes of PICTURE_SIZES repeat.
        scale: multiplies the sizes, in pixels.

    Returns:
        The files, in order.
    """
    folder, files = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    skies = ["skyblue", "khaki", "lightpink", "palegreen", "plum"]
    grounds = ["seagreen", "peru", "slateblue", "sienna", "teal"]
    for index in range(count):
        width, height = (side * scale for side in PICTURE_SIZES[index % len(PICTURE_SIZES)])
        picture = Image.new("RGB", (width, height), skies[index % 5])
        draw = ImageDraw.Draw(picture)
        draw.rectangle((0, int(height * 0.7), width, height), fill=grounds[(index + index // 5) % 5])
        x, y, unit = width * (0.35 + 0.1 * (index % 4)), height * 0.6, min(width, height) / 10
        draw.ellipse((x - 2.4 * unit, y - 1.4 * unit, x + 1.6 * unit, y + 1.4 * unit), fill="saddlebrown")
        for leg in (-1.8, -0.9, 0.4, 1.1):
            draw.rectangle((x + (leg - 0.25) * unit, y, x + (leg + 0.25) * unit, y + 2.4 * unit), fill="saddlebrown")
        draw.ellipse((x + 0.6 * unit, y - 2.8 * unit, x + 2.8 * unit, y - 0.6 * unit), fill="chocolate")
        draw.ellipse((x + 0.5 * unit, y - 3.0 * unit, x + 1.2 * unit, y - 1.4 * unit), fill="black")
        draw.ellipse((x + 1.8 * unit, y - 2.2 * unit, x + 2.2 * unit, y - 1.8 * unit), fill="white")
        files.append(folder / f"dog_{index:02d}.png")
        picture.save(files[-1])
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the checkpoint goes")
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="the shapes of the models (default: tiny)")
    parser.add_argument("--no_guidance_embeds", action="store_true", help="like FLUX.1 [schnell]: no guidance input")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.add_argument("--pictures", metavar="FOLDER", help="also draw a few sample pictures into this folder")
    args = parser.parse_args()
    folder = write_checkpoint(args.folder, args.size, not args.no_guidance_embeds, args.seed)
    megabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    print(f"Wrote a random FLUX.1 checkpoint of size {args.size} to {folder} ({megabytes:,.1f} MB)")
    if args.pictures:
        files = write_pictures(args.pictures)
        print(f"Drew {len(files)} pictures into {args.pictures}")


if __name__ == "__main__":
    main()
