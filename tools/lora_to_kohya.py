#!/usr/bin/env python
# Copyright 2026 The FLUX DreamBooth authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Rewrite a FLUX.1 LoRA from diffusers' names to those of kohya's scripts, which ComfyUI and Forge read as well.

    python tools/lora_to_kohya.py pytorch_lora_weights.safetensors     # to pytorch_lora_weights_kohya.safetensors
    python tools/lora_to_kohya.py INPUT OUTPUT --base black-forest-labs/FLUX.1-dev  # also: does it fit this model?

Kohya has one layer for what are three or four in diffusers (query, key, value and, in the single blocks, the MLP's
input). There the A matrices are stacked and the B matrices put on the diagonal of a larger one, with rows of zeros for
what has no adapter, so that the same is added to the weights.
"""

import argparse
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

logger = logging.getLogger("lora_to_kohya")
BLOCKS = {  # kohya's layers of a block, and those of diffusers that make up their rows, in order
    "transformer_blocks": {
        "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"], "img_attn_proj": ["attn.to_out.0"],
        "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"], "txt_attn_proj": ["attn.to_add_out"],
        "img_mlp_0": ["ff.net.0.proj"], "img_mlp_2": ["ff.net.2"], "txt_mlp_0": ["ff_context.net.0.proj"],
        "txt_mlp_2": ["ff_context.net.2"], "img_mod_lin": ["norm1.linear"], "txt_mod_lin": ["norm1_context.linear"],
    },
    "single_transformer_blocks": {
        "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"], "linear2": ["proj_out"],
        "modulation_lin": ["norm.linear"],
    },
}  # fmt: skip
OUTSIDE = {"x_embedder": "img_in", "context_embedder": "txt_in"} | {  # the layers before the blocks
    f"time_text_embed.{name}_embedder.linear_{number}": f"{kohya}_{side}_layer"
    for name, kohya in (("timestep", "time_in"), ("guidance", "guidance_in"), ("text", "vector_in"))
    for number, side in ((1, "in"), (2, "out"))
}
CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
# Model, layer and role of a tensor, in today's spelling and in the older ones that diffusers still reads.
KEY = re.compile(r"(transformer|text_encoder)\.(.+?)(?:[._]lora(?:_linear_layer)?[._](A|B|down|up)\.weight|\.(alpha))")
ROLES = {"A": "down", "B": "up"}


def read_layers(state: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Each layer's `down` (rank, in), `up` (out, rank) and perhaps `alpha` (one number); the keys of other tensors.

    Raises:
        ValueError: for DoRA and biases, and for a pair that is incomplete or whose shapes do not go together.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in state.items():
        if re.search(r"lora_magnitude_vector|dora_scale|lora_B\.bias", key):
            kind = "bias" if key.endswith("bias") else "magnitude of DoRA"
            raise ValueError(
                f"{key} is a {kind}, for which kohya's format has no place; it can only be used in diffusers"
            )
        if not (match := KEY.fullmatch(key)):
            unknown.append(key)
            continue
        model, path, role = match[1], match[2].replace(".processor.", "."), match[3] or match[4]
        if model == "text_encoder":
            path = "text_model." + re.sub(r"\bto_(q|k|v|out)$", r"\1_proj", path.removeprefix("text_model."))
        path += ".0" if path.endswith(".to_out") else ""
        layers.setdefault(f"{model}.{path}", {})[ROLES.get(role, role)] = tensor
    for name, layer in layers.items():
        down, up, alpha = (layer.get(role, torch.empty(0)) for role in ("down", "up", "alpha"))
        if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1] or alpha.numel() > 1:
            shapes = {role: tuple(tensor.shape) for role, tensor in layer.items()}
            raise ValueError(f"{name} has {shapes}, not down (rank, in) and up (out, rank); the file is damaged")
    return layers, unknown


def scale_of(name: str, layer: dict[str, Tensor], metadata: dict[str, Any]) -> float:
    """What B @ A is multiplied by: by the metadata, or by the layer's own alpha, or else 1."""
    (model, path), rank = name.split(".", 1), len(layer["down"])
    if f"{model}.lora_alpha" not in metadata:
        return layer["alpha"].item() / rank if "alpha" in layer else 1.0
    if "alpha" in layer:
        raise ValueError(f"{name} has an alpha of its own beside the metadata's; only one of them can be meant")
    patterns = metadata.get(f"{model}.alpha_pattern") or {}  # peft takes the first that matches
    matching = [alpha for pattern, alpha in patterns.items() if re.search(rf"(^|\.)({pattern})$", path)]
    alpha = (matching or [metadata[f"{model}.lora_alpha"]])[0]
    return alpha / (math.sqrt(rank) if metadata.get(f"{model}.use_rslora") else rank)


def kohya_layer(name: str) -> tuple[str, list[str]] | None:
    """Kohya's layer that a layer belongs to, and all the layers that make it up; None if kohya has none."""
    model, path = name.split(".", 1)
    if model == "text_encoder":
        return (f"lora_te1_{path.replace('.', '_')}", [name]) if CLIP_LAYER.fullmatch(path) else None
    if path in OUTSIDE:
        return f"lora_unet_{OUTSIDE[path]}", [name]
    kind, number, layer = [*path.split(".", 2), "", ""][:3]
    blocks = "single_blocks" if kind.startswith("single") else "double_blocks"
    for kohya, members in BLOCKS.get(kind, {}).items():
        if layer in members:
            return f"lora_unet_{blocks}_{number}_{kohya}", [f"{model}.{kind}.{number}.{member}" for member in members]
    return None


def convert(
    state: dict[str, Tensor], metadata: dict[str, Any] | None = None, dim: int | None = None
) -> dict[str, Tensor]:
    """A LoRA's tensors as kohya's `<layer>.lora_down.weight`, `.lora_up.weight` and `.alpha`, in their own dtype.

    Args:
        state: "transformer.<layer>.lora_A.weight" (rank, in), "….lora_B.weight" (out, rank) and so on.
        metadata: rank, alpha and the like, by "transformer.<setting>"; None if the file has none.
        dim: the model's inner dimension d. Fused layers have d inputs; query, key and value d outputs, the MLP's input
            4d. By default as many as an adapter of the fused layer has inputs.

    Raises:
        ValueError: if nothing can be converted or a fused layer's adapter has other sizes; and from `read_layers`.
    """
    layers, unknown = read_layers(state)
    found = {name: kohya_layer(name) for name in layers}
    left_out = [*(name for name, kohya in found.items() if not kohya), *unknown]
    if len(left_out) == len(found) + len(unknown):
        example = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
        raise ValueError(f"no layer of FLUX.1 in it by diffusers' names, like {example}, but {left_out[:3]}")
    if left_out:
        logger.warning(f"Left out, as kohya has no name for it: {', '.join(left_out)}")
    out: dict[str, Tensor] = {}
    for kohya, members in dict(filter(None, found.values())).items():
        pairs = {name: layers[name] for name in members if name in layers}
        scales = {name: scale_of(name, pair, metadata or {}) for name, pair in pairs.items()}
        scale = max(scales.values()) or 1.0  # one alpha for all; what differs goes into B
        width = dim or next(iter(pairs.values()))["down"].shape[1]
        rows = {name: 4 * width if name.endswith("proj_mlp") else width for name in members}
        ups = {name: torch.zeros(rows[name], 0, dtype=torch.bool) for name in members}  # bool: takes the others' dtype
        for name, pair in pairs.items():
            sizes = (pair["down"].shape[1], len(pair["up"]))
            if len(members) > 1 and sizes != (width, rows[name]):
                raise ValueError(
                    f"{name} has {sizes} inputs and outputs, not {(width, rows[name])}: it is for another model"
                )
            ups[name] = pair["up"] if scales[name] == scale else pair["up"] * (scales[name] / scale)
        down = torch.cat([pair["down"] for pair in pairs.values()])
        out |= {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": torch.block_diag(*ups.values())}
        out[f"{kohya}.alpha"] = torch.tensor(scale * len(down))
    return out


def read_dim(base: str) -> int:
    """The inner dimension of a model in a folder or on the Hub; OSError or ValueError if it cannot be read."""
    file = Path(base, "transformer/config.json")
    if not Path(base).is_dir():
        from huggingface_hub import hf_hub_download  # optional

        file = Path(hf_hub_download(base, "transformer/config.json"))
    config = json.loads(file.read_text())
    if not {"num_attention_heads", "attention_head_dim"} <= config.keys():
        raise ValueError(f"--base={base}: {file} is not the configuration of a FLUX.1 transformer")
    return config["num_attention_heads"] * config["attention_head_dim"]


def convert_file(source: Path, output: Path, base: str | None) -> int:
    """Convert a file, and return how many layers it has by kohya's names.

    Raises:
        OSError, ValueError: if that cannot be done; then there is no new file, and an older OUTPUT is as it was.
    """
    if not source.is_file():
        raise ValueError(f"{source} is not a file; give the .safetensors file of a LoRA")
    if output.exists() and output.samefile(source):
        raise ValueError(f"{output} is the INPUT, which is not overwritten; give another OUTPUT")
    try:
        with safe_open(source, "pt") as file:
            state, text = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        metadata = json.loads(text.get("lora_adapter_metadata", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{source} is damaged or no safetensors file: {error}") from error
    converted = convert(state, metadata, read_dim(base) if base else None)
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_bytes(save(converted, {"format": "pt"}))
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return len(converted) // 3


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT", type=Path, help="LoRA file that diffusers reads")
    parser.add_argument("output", metavar="OUTPUT", type=Path, nargs="?", help="default: INPUT's name with _kohya")
    parser.add_argument("--base", help="folder or Hub name of the model that the LoRA is for; only its sizes are read")
    args = parser.parse_args(arguments)
    output = args.output or args.input.with_name(f"{args.input.stem}_kohya.safetensors")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        print(f"Wrote {output}: {convert_file(args.input, output, args.base)} layers")
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {args.input} is not converted: {error}\n")


if __name__ == "__main__":
    main()
