#!/usr/bin/env python
# Copyright 2026 The FLUX DreamBooth authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# ruff: noqa: E402

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<2.14", "diffusers~=0.42.1", "transformers~=5.23.0", "accelerate~=1.15.0", "peft~=0.21.2",
#   "huggingface_hub~=2.4.0", "safetensors~=0.8.0", "tokenizers~=0.23.3", "numpy~=2.4.6", "Pillow~=13.0",
#   "tqdm~=4.70", "filelock~=4.2", "psutil>=6,<8", "xxhash>=3.5,<5", "sentencepiece~=0.2.3", "protobuf~=7.36.2",
#   "datasets~=5.2.0", "bitsandbytes~=0.50.2", "prodigyopt~=1.1.2", "tensorboard~=2.21.0", "wandb~=0.31.0",
# ]
# ///
"""DreamBooth for FLUX.1 [dev], full fine-tuning: teach the model a subject by training every weight of the transformer.

    accelerate launch train_dreambooth_flux.py --pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev \
        --instance_data_dir=dog --instance_prompt="a photo of sks dog" --output_dir=trained-flux \
        --mixed_precision=bf16 --resolution=512 --train_batch_size=1 --guidance_scale=1 --gradient_checkpointing \
        --cache_latents --use_8bit_adam --learning_rate=1e-5 --max_train_steps=500 \
        --validation_prompt="A photo of sks dog in a bucket" --seed=0

What is trained is held in float32: for FLUX.1 [dev] 44 GiB of weights, as much of gradients, and the optimizer's state.
With `--train_text_encoder`, CLIP is trained whole too; T5 is only ever used to encode the prompts.

To change something, edit this. All but `FLAGS` (section 8) is in part one; what a run writes: section 14.
    a flag                      a line of `FLAGS`; in the loss it is `options.NAME`, elsewhere `args.NAME`
    the loss, or its target     `flow_matching_loss`, `training_loss`: all they may depend on is in `StepInputs`
    noise, and its levels       `prepare_inputs`, `sample_sigmas`; `validation_loss` has its own
    what an example holds       `load_picture`; from there to the loss: `collate`, `prepare_inputs`, `StepInputs`
    prompts, the crop, the flip `DreamBoothDataset.prompts` (all of a run, encoded first); `draw_crop`, `crop_picture`
    which weights are trained   `load_transformer`; that is also where they come from
    an optimizer, its rates     an entry of `OPTIMIZERS`; `parameter_groups`
    validation pictures         `draw_validation_pictures`, `sample_pictures`
    what is logged              `log_step`; numbers of the loss: `StepInputs.logged`, in `training_loss`
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import gc
import hashlib
import importlib
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import weakref
import zlib
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

for library in ("DIFFUSERS", "TRANSFORMERS"):  # they warn, as they are imported, of packages that are not needed
    os.environ.setdefault(f"{library}_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # so does this one
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # else up to 6 GiB are lost to fragments
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import accelerate
import diffusers
import numpy as np
import psutil
import torch
import transformers
import xxhash
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    disable_fsdp_ram_efficient_loading,
    gather_object,
)
from accelerate.utils.memory import clear_device_cache
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import (
    EMAModel,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, ModelCard, ModelCardData, load_torch_model, save_torch_state_dict, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast
from transformers.hf_argparser import string_to_bool

logger = logging.getLogger(__name__)

KIND, TAGS, PROJECT = "full fine-tuning", ["full"], "dreambooth-flux"
OUTPUT_DIR, TEXT_LENGTH = "flux-dreambooth", 77  # defaults
PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PIXELS_PER_TOKEN = 16  # the VAE shrinks by 8, packing by 2: a side must be a multiple of this
ASPECT_RATIOS = (1, 7 / 6, 4 / 3, 3 / 2, 7 / 4, 2, 5 / 2, 3)  # of automatic buckets, with their inverses
VALIDATION_SIGMAS = 8  # noise levels of the validation loss


# ==================================================== 1. The story ====================================================


def main(args: Namespace) -> None:
    """The story of a run. What a stage loads is freed when its function returns: the peak is the largest stage."""
    accelerator = make_accelerator(args)
    pictures, resumed, repo_id = check_everything(args, accelerator)  # what can go wrong, before a model is loaded
    state = start_state(args, resumed)
    dataset = prepare_dataset(args, accelerator, pictures, state.seed)  # draws the class pictures that are missing
    given = flag_lines(args)  # before steps and a scaled rate are filled in
    resolve_steps(args, accelerator, dataset, state)
    finished = broadcast_object_list([finished_state(args, dataset)])[0]
    if finished is not None:
        logger.info(f"Nothing to do: all {args.max_train_steps} steps are done; raise --max_train_steps to go on")
        if args.push_to_hub and accelerator.is_main_process:
            with warn_if_unwritable("The model card"):
                if (Path(args.output_dir) / "README.md").exists():
                    name_repository(args, repo_id)
                else:
                    write_model_card(args, accelerator, repo_id, pictures, finished)
            push_to_hub(args, repo_id)
        end_training(accelerator)
        return
    start_trackers(args, accelerator)
    data = prepare_data(args, accelerator, dataset, pictures)  # prompts to embeddings, pictures to latents
    train_and_save(args, accelerator, data, resumed, state, given)
    if args.validation_prompt and not args.skip_final_inference:
        embeds = [data.prompts[prompt] for prompt in args.validation_prompt]
        del data  # and with it the VAE: what was saved brings its own
        with stage(args, accelerator, "Drawing the final pictures"):
            draw_final_pictures(args, accelerator, embeds, state, weight_dtype(accelerator))
    if accelerator.is_main_process:
        with warn_if_unwritable("The model card"):
            write_model_card(args, accelerator, repo_id, pictures, state)
        with warn_if_unwritable("The mark of a finished run"):
            mark_finished(args, dataset, state)
        if args.push_to_hub:
            push_to_hub(args, repo_id)
    end_training(accelerator)
    logger.info(closing_summary(args, state))


def train_and_save(
    args: Namespace,
    accelerator: Accelerator,
    data: TrainingData,
    resumed: Checkpoint | None,
    state: RunState,
    given: list[str],
) -> None:
    """Load the transformer, go on from a checkpoint, train, save the result. All its memory is free when it returns."""
    with stage(args, accelerator, "Loading the transformer"):
        trained = prepare_training(args, accelerator, data, resumed, state.seed)
    run = Run(args, accelerator, data, trained, state, StopSignals())
    changes = [] if resumed is None else load_checkpoint(run, resumed)
    schedule = make_schedule(args, accelerator, data.dataset, state)
    if accelerator.is_main_process:
        set_aside(args, resumed, state.step, changed=bool(changes))
        with warn_if_unwritable(FLAGS_FILE):
            write_file(Path(args.output_dir) / FLAGS_FILE, "\n".join(given) + "\n")
    with run.signals as signals:
        with stage(args, accelerator, "Training"), logging_redirect_tqdm():
            if state.step == 0 or state.owes_validation:
                validate(run)
                if state.step and run.asked_to_stop():  # it was cut short, and is still owed
                    save_checkpoint(run)
                    stop_run(run, signals.pending(), f"checkpoint-{state.step}")
            train(run, schedule)
        with stage(args, accelerator, "Saving the result"):
            dtype = torch.float32 if args.upcast_before_saving else weight_dtype(accelerator)
            partial = Path(args.output_dir) / f".results{PARTIAL}"
            with cleanup_on_failure(args, "the result", partial, dtype.itemsize * trained.size), trained.averaged():
                save_results(args, accelerator, trained, dtype)
        if run.asked_to_stop():
            save_checkpoint(run)  # so that resuming only draws pictures and writes the card
            stop_run(run, signals.pending(), f"the result and checkpoint-{state.step}")
    accelerator.free_memory()
    accelerator._custom_objects.clear()  # the average


def train(run: Run, schedule: MicroBatches) -> None:
    """The loop: from `state.step` to `schedule.last_step`, with validation and checkpoints on the way."""
    args, accelerator, trained, state = run.args, run.accelerator, run.trained, run.state
    loader = DataLoader(
        run.data.dataset,
        batch_sampler=schedule,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_signals,
    )
    sigma_table = load_scheduler(args).sigmas
    start, sums = time.perf_counter(), dict[str, Any]()  # over a step, of the loss and of `StepInputs.logged`
    progress = Progress(run, schedule)
    batches = ((batch["keys"][0], prepare_inputs(run, batch, sigma_table)) for batch in loader)
    upcoming = next(batches, None)
    models: list[Any] = trained.models
    while upcoming is not None:
        key, inputs = upcoming
        accelerator.sync_gradients = key.last
        for model in models:  # DDP shares gradients at the end of a step only; FSDP2 and ZeRO, which hold parts, always
            model.require_backward_grad_sync = key.last
        # What still draws from the global generator, dropout, is repeatable too.
        torch.manual_seed(generator_for(state.seed, "dropout", key.epoch, key.position).initial_seed())
        if trained.text_encoder is not None:
            inputs.pooled_prompt_embeds = trained.text_encoder(inputs.pooled_prompt_embeds).pooler_output
        loss = training_loss(trained.transformer, inputs)
        backward(run, loss)
        sums = {name: sums.get(name, 0) + value.detach() for name, value in {"loss": loss, **inputs.logged}.items()}
        if not key.last:
            upcoming = next(batches, None)
            continue
        grad_norm = clip_gradients(run)
        trained.optimizer.step()
        trained.lr_scheduler.step()
        trained.optimizer.zero_grad()
        if trained.ema is not None:
            trained.ema.step(trained.parameters)
        state.step += 1
        upcoming = next(batches, None)  # reading the loss waits for the device: the next inputs are made before
        own = torch.stack([*sums.values(), torch.full_like(loss, run.signals.pending())])
        *numbers, stop = accelerator.reduce(own, reduction="sum").tolist()
        sums = dict(zip(sums, numbers, strict=True))
        progress.update(log_step(run, sums, grad_norm, time.perf_counter() - start))
        epoch, left = divmod(state.step, schedule.steps_per_epoch)
        due = left == 0 and (epoch - 1) % args.validation_epochs == 0
        due = due or bool(args.validation_steps and state.step % args.validation_steps == 0)
        state.owes_validation = due
        if stop or state.step % args.checkpointing_steps == 0:
            save_checkpoint(run)
        if due and not stop:
            validate(run)
            stop = run.asked_to_stop()  # which cuts a validation short: a resumed run makes it up
            if not stop:
                mark_validated(run)
            elif state.step % args.checkpointing_steps:  # else the checkpoint that owes it is there
                save_checkpoint(run)
        if stop:
            progress.close()
            stop_run(run, run.signals.pending(), f"checkpoint-{state.step}")
        sums, start = {}, time.perf_counter()
    progress.close()


def log_step(run: Run, sums: dict[str, float], grad_norm: Tensor | None, seconds: float) -> dict[str, float]:
    """Log `sums` of an optimizer step, which are means, and what is added here; stop the run if they are not finite."""
    check_finite(run, sums["loss"], grad_norm)
    group = run.trained.optimizer.param_groups[0]
    values = sums | {"lr": run.trained.lr_scheduler.get_last_lr()[0], "step_time": seconds}
    values |= {} if grad_norm is None else {"grad_norm": float(grad_norm)}
    values |= {"prodigy_d": float(group["d"])} if "d" in group else {}  # Prodigy's estimate of the step size
    values |= peak_memory(run.accelerator.device)
    run.state.seconds += seconds
    with tracking(run.accelerator):
        run.accelerator.log(values, step=run.state.step)
    return values


@dataclass
class StepInputs:
    """All that the loss of a micro-batch may depend on, on the device.

    B is the number of pictures. With prior preservation the instance pictures come first, then as many class pictures.
    """

    latents: Tensor  # (B, C, H, W), scaled
    noise: Tensor  # (B, C, H, W)
    sigmas: Tensor  # (B,)
    prompt_embeds: Tensor  # (B, T, D), from T5
    pooled_prompt_embeds: Tensor  # (B, P), from CLIP; if that is trained, its token ids (B, 77), which `train` replaces
    guidance: Tensor | None  # (B,), or None for a model that takes none (FLUX.1 [schnell])
    loss_weights: Tensor  # (B,): 1 / instance pictures of the step; in a second half times --prior_loss_weight
    options: Namespace  # every flag by its name
    token_weights: Tensor | None = None  # (B, L), of masks, if there are any
    logged: dict[str, Tensor] = field(default_factory=dict)  # numbers that `training_loss` adds, weighted like the loss


def prepare_inputs(run: Run, batch: dict[str, Any], sigma_table: Tensor) -> StepInputs:
    """Turn what `collate` made of a micro-batch into the inputs of its loss; all that is random is drawn here."""
    args, data, seed = run.args, run.data, run.state.seed
    device, keys, loss_weights = run.accelerator.device, batch["keys"], batch["loss_weights"]

    def move(tensor: Tensor) -> Tensor:  # a copy from page-locked memory does not wait for what the device is busy with
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    sources = ("instance", "class")[: len(batch["prompts"]) // len(keys)]  # without class pictures only the first
    draw_keys = [(source, key.epoch, key.position) for source in sources for key in keys]  # of a picture's draws
    if "latents" in batch:
        distribution = LatentDistribution(*map(move, batch["latents"]))
    else:
        distribution = encode_pixels(data.vae, move(batch["pixels"]))
    shape = distribution.mean.shape[1:]
    posterior = move(draw_normal(shape, seed, "posterior", draw_keys))
    shift = flow_shift(args.flow_shift, shape[-2] // 2 * (shape[-1] // 2), data.scheduler_config)
    sigmas = sample_sigmas([generator_for(seed, "sigma", *draw) for draw in draw_keys], sigma_table, args, shift)
    embeds = [data.prompts[prompt] for prompt in batch["prompts"]]
    pooled = "pooled_prompt_embeds" if run.trained.text_encoder is None else "clip_ids"
    return StepInputs(
        latents=sample_latents(distribution, posterior, data.vae_config),
        noise=move(draw_normal(shape, seed, "noise", draw_keys)),
        sigmas=move(sigmas),
        prompt_embeds=torch.stack([move(embed.prompt_embeds) for embed in embeds]),
        pooled_prompt_embeds=torch.stack([move(getattr(embed, pooled)) for embed in embeds]),
        guidance=make_guidance(unwrap(run.trained.transformer), args.guidance_scale, len(embeds), device),
        loss_weights=move(torch.cat([loss_weights, args.prior_loss_weight * loss_weights])[: len(embeds)]),
        options=args,
        token_weights=move(batch["token_weights"]) if "token_weights" in batch else None,
    )


# ======================================================================================================================
# 2. Flow matching
#
# B pictures, C latent channels, H x W latent height and width (pixels / 8), L = H/2 * W/2 image tokens, T text tokens,
# D and P the widths of T5 and CLIP. sigma 1 is pure noise; the model predicts the velocity `noise - latents`.
# ======================================================================================================================


def training_loss(transformer: nn.Module, inputs: StepInputs) -> Tensor:
    """From latents, noise and sigmas to the loss of a micro-batch, a scalar; in training and validation alike.

    With prior preservation the second half of each tensor is of class pictures.
    """
    noisy_latents = add_noise(inputs.latents, inputs.noise, inputs.sigmas)
    text = (inputs.prompt_embeds, inputs.pooled_prompt_embeds)
    velocity = predict_velocity(transformer, noisy_latents, inputs.sigmas, *text, inputs.guidance)
    target = pack_latents(inputs.noise - inputs.latents)
    losses = flow_matching_loss(velocity, target, inputs.sigmas, inputs.options, inputs.token_weights)
    return (inputs.loss_weights * losses).sum()


def flow_matching_loss(
    velocity: Tensor, target: Tensor, sigmas: Tensor, options: Namespace, token_weights: Tensor | None = None
) -> Tensor:
    """Weighted mean squared error of each picture's packed velocity, (B, L, 4C), against its target: (B,), float32.

    Packing is a permutation, so the mean is taken over the packed tokens. Weights: sigma_sqrt 1 / sigma^2, cosmap
    2 / (pi * (1 - 2 sigma + 2 sigma^2)), else 1 (https://arxiv.org/abs/2403.03206). With `token_weights` (B, L) the
    mean over the tokens is weighted.
    """
    errors = (velocity.float() - target.float()).square()
    if token_weights is not None:
        errors = errors * (token_weights / token_weights.mean(dim=1, keepdim=True).clamp(min=1e-6))[..., None]
    return compute_loss_weighting_for_sd3(options.weighting_scheme, sigmas) * errors.mean(dim=(1, 2))


def predict_velocity(
    transformer: nn.Module,
    noisy_latents: Tensor,
    sigmas: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    guidance: Tensor | None,
) -> Tensor:
    """The one call of the model, a FluxTransformer2DModel, wrapped or not: the velocity, packed, (B, L, 4C).

    Shapes of the inputs: `StepInputs`. The model takes sigma itself as its timestep.
    """
    return transformer(
        hidden_states=pack_latents(noisy_latents),
        timestep=sigmas,
        guidance=guidance,
        pooled_projections=pooled_prompt_embeds,
        encoder_hidden_states=prompt_embeds,
        txt_ids=noisy_latents.new_zeros(prompt_embeds.shape[1], 3),
        img_ids=make_image_ids(noisy_latents.shape[-2], noisy_latents.shape[-1], noisy_latents.device),
        return_dict=False,
    )[0]


def sample_sigmas(generators: list[torch.Generator], sigma_table: Tensor, options: Namespace, shift: float) -> Tensor:
    """Draw one noise level a picture, with a generator each: (B,), float32.

    u in [0, 1) is drawn by `--weighting_scheme` (logit_normal and mode: https://arxiv.org/abs/2403.03206, section 3.1;
    the others uniformly) and looked up in the scheduler's table, which has its static shift in it; then it is shifted.
    """
    scheme = (options.weighting_scheme, 1, options.logit_mean, options.logit_std, options.mode_scale)
    u = torch.cat([compute_density_for_timestep_sampling(*scheme, generator=generator) for generator in generators])
    index = (u * len(sigma_table)).long().clamp(0, len(sigma_table) - 1)
    return shift_sigmas(sigma_table[index].float(), shift)


def flow_shift(setting: float | str | None, tokens: int, config: Any) -> float:
    """The shift for a picture of L image tokens: "dynamic" is exp(mu) of FLUX.1's sampler, mu linear in L."""
    if setting != "dynamic":
        return 1.0 if setting is None else float(setting)
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return math.exp(config.base_shift + slope * (tokens - config.base_image_seq_len))


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Sigmas moved towards noise for a shift above 1; https://arxiv.org/abs/2403.03206, equation 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Latents (B, C, H, W) on their straight path to noise, at sigmas (B,); https://arxiv.org/abs/2210.02747."""
    sigmas = sigmas.view(-1, 1, 1, 1)
    return (1 - sigmas) * latents + sigmas * noise


def pack_latents(latents: Tensor) -> Tensor:
    """Each 2 x 2 patch of latents (B, C, H, W) becomes a token: (B, L, 4C), four values of each channel in turn."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), 4 * channels)


def make_image_ids(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Position of each token, (L, 3): zero, row, column, for latents of `height` x `width`."""
    sides = (torch.arange(side // 2, device=device, dtype=torch.float32) for side in (height, width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3)


def make_guidance(transformer: Any, scale: float, batch: int, device: torch.device) -> Tensor | None:
    """The guidance input of an unwrapped transformer, (B,), or None if it takes none (FLUX.1 [schnell])."""
    return torch.full((batch,), scale, device=device) if transformer.config.guidance_embeds else None


# ============================ 3. Data: what a picture is, and what an example holds of it =============================

Size = tuple[int, int]  # width and height in pixels
Pictures = dict[str, list["Picture"]]  # by source: "instance", "class", and "validation" for those held out


@dataclass(frozen=True)
class Picture:
    """One picture and its prompt."""

    name: str
    open: Callable[[], Image.Image]  # as it is stored
    prompt: str
    size: Size = (1, 1)  # of the upright picture; this and a digest of its pixels are found by `check_pictures`
    digest: str = ""
    mask: Callable[[], Image.Image] | None = None  # upright, 8-bit grey, of the picture's proportions

    def read(self) -> Image.Image:
        """The picture upright, in 8-bit RGB."""
        with self.open() as stored:
            return to_rgb(stored)


class Crop(NamedTuple):
    """What of a picture is trained on: it is resized to cover `size`, cropped there, and perhaps mirrored."""

    size: Size
    left: int  # pixels after resizing
    top: int
    flip: bool


def draw_crop(picture_size: Size, size: Size, args: Namespace, generator: torch.Generator | None) -> Crop:
    """Choose how a picture is cropped to `size`; without a generator it is the centre, not mirrored."""
    width, height = resized_size(*picture_size, size)
    spare = (width - size[0], height - size[1])
    if generator is None or args.center_crop:
        left, top = (round(side / 2) for side in spare)
    else:
        left, top = (int(torch.randint(side + 1, (), generator=generator)) for side in spare)
    flip = generator is not None and args.random_flip and bool(torch.rand((), generator=generator) < 0.5)
    return Crop(size, left, top, flip)


def crop_picture(image: Image.Image, crop: Crop, mode: str) -> Image.Image:
    """A picture, or a mask aligned with it, at `crop.size`; `mode` is a filter of `--image_interpolation_mode`."""
    image = image.resize(resized_size(*image.size, crop.size), Image.Resampling[mode.upper()])
    image = image.crop((crop.left, crop.top, crop.left + crop.size[0], crop.top + crop.size[1]))
    return ImageOps.mirror(image) if crop.flip else image


@functools.lru_cache(maxsize=256)
def read_resized(read: Callable[[], Image.Image], size: Size, mode: str) -> Image.Image:
    """What `read` gives, covering `size`. Kept: of a photo of 24 megapixels it takes half a second."""
    image = read()
    return image.resize(resized_size(*image.size, size), Image.Resampling[mode.upper()])


def mask_tokens(mask: Image.Image | None, crop: Crop, args: Namespace) -> Tensor:
    """Weight of each token's loss, (L,): the mean of the mask over its 16 x 16 pixels; 1 where there is no mask."""
    width, height = (side // PIXELS_PER_TOKEN for side in crop.size)
    if mask is None:
        return torch.ones(height * width)
    mask = crop_picture(mask, crop, args.image_interpolation_mode)
    shares = torch.from_numpy(np.array(mask)).view(height, PIXELS_PER_TOKEN, width, PIXELS_PER_TOKEN).float() / 255
    return args.unmasked_weight + (1 - args.unmasked_weight) * shares.mean(dim=(1, 3)).flatten()


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture as (3, height, width), float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)


def load_picture(
    picture: Picture, size: Size, args: Namespace, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """What an example holds of a picture; whatever else stands beside its pixels (a mask, a weight) is added here."""
    mode = args.image_interpolation_mode
    image = read_resized(picture.read, size, mode)
    crop = draw_crop(image.size, size, args, generator)
    loaded = {"crop": crop, "pixels": to_pixels(crop_picture(image, crop, mode))}
    if args.mask_data_dir or args.alpha_mask:
        loaded["token_weights"] = mask_tokens(picture.mask and read_resized(picture.mask, size, mode), crop, args)
    return loaded


class DreamBoothDataset(Dataset):
    """Instance pictures, repeated, each paired with a class picture where there are any, as `args` say."""

    def __init__(
        self, instance_pictures: list[Picture], class_pictures: list[Picture], args: Namespace, seed: int
    ) -> None:
        repeated, examples = [picture for picture in instance_pictures for _ in range(args.repeats)], []
        for resolution in resolutions(args):
            sizes, smallest = training_sizes(args, resolution), resolution == min(resolutions(args))
            for picture in repeated:
                size = nearest_size(picture.size, sizes)
                if smallest or resized_size(*picture.size, size)[0] <= picture.size[0]:  # it has the pixels for it
                    examples.append((picture, size))
        self.sources = {"instance": [picture for picture, _ in examples]}
        self.sources |= {"class": class_pictures} if class_pictures else {}
        self.args, self.seed = args, seed
        # Of each example: that of its instance picture, which the class picture is cropped to as well.
        self.buckets = [examples[index % len(examples)][1] for index in range(len(self))]
        self.cached: dict[tuple[str, int, Size, int], dict[str, Any]] | None = None  # source, index, bucket and view

    def __len__(self) -> int:
        return max(len(pictures) for pictures in self.sources.values())

    @property
    def prompts(self) -> list[str]:
        """Every prompt that `__getitem__` may give, once: they are encoded before the training, no other is."""
        prompts = [picture.prompt for pictures in self.sources.values() for picture in pictures]
        return list(dict.fromkeys(prompts + ([""] if self.args.caption_dropout else [])))

    def load(self, source: str, index: int, size: Size, *draw: int) -> dict[str, Any]:
        """A picture at `size`, cropped as `draw` names; with `--cache_latents` its pixels become latents, once."""
        generator = generator_for(self.seed, "view", source, *draw)  # another name here would change every crop
        return load_picture(self.sources[source][index], size, self.args, generator)

    def __getitem__(self, key: ExampleKey) -> dict[str, Any]:
        example: dict[str, Any] = {"key": key}
        size, drawn = self.buckets[key.example], generator_for(self.seed, "caption dropout", key.epoch, key.position)
        dropped = {"instance"} if torch.rand((), generator=drawn) < self.args.caption_dropout else set()
        for source, pictures in self.sources.items():
            index = key.example % len(pictures)
            if self.cached is None:
                loaded = self.load(source, index, size, key.epoch, key.position)
            else:
                drawn = generator_for(self.seed, "cached view", source, key.epoch, key.position)
                view = int(torch.randint(self.args.cached_views, (), generator=drawn))
                loaded = self.cached[source, index, size, view]
            example[source] = {"prompt": "" if source in dropped else pictures[index].prompt} | loaded
        return example


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """B examples as one batch of B pictures, or of 2B: all instance pictures, then all class pictures.

    Returns:
        "keys": list of B; "loss_weights": (B,); "prompts": list of B or 2B; then all of `load_picture`, stacked:
        "pixels": (B or 2B, 3, H, W), or "latents": a LatentDistribution of (B or 2B, C, h, w) each; "crop".
    """
    sources = [source for source in ("instance", "class") if source in examples[0]]
    pictures = default_collate([example[source] for source in sources for example in examples])
    keys = [example["key"] for example in examples]
    loss_weights = torch.tensor([key.loss_weight for key in keys])
    return {"keys": keys, "loss_weights": loss_weights, "prompts": pictures.pop("prompt")} | pictures


# ============================== 4. Encoders: prompts to embeddings, pictures to latents ===============================


class PromptEmbeds(NamedTuple):
    """One prompt as FLUX.1 takes it, on the CPU."""

    prompt_embeds: Tensor  # (T, D), from T5
    pooled_prompt_embeds: Tensor  # (P,), from CLIP
    clip_ids: Tensor  # (77,), for a CLIP that is trained


@torch.no_grad()
def encode_prompts(
    args: Namespace, accelerator: Accelerator, prompts: list[str], dtype: torch.dtype
) -> dict[str, PromptEmbeds]:
    """Encode every distinct prompt of the run once, the processes sharing the work, and free the encoders.

    The pipeline itself encodes, so that training sees what sampling will see: T5 padded to `--max_sequence_length`,
    padding attended to.
    """
    mine = prompts[accelerator.process_index :: accelerator.num_processes]
    if not mine:
        return gather_dicts({})
    tokenizers = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}
    parts = {name: from_base(kind, args, subfolder=name) for name, kind in tokenizers.items()}
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    parts |= {name: from_base(kind, args, subfolder=name, dtype=dtype) for name, kind in encoders.items()}
    pipeline = FluxPipeline(scheduler=None, vae=None, transformer=None, **parts).to(accelerator.device)
    lengths = {"CLIP": (pipeline.tokenizer, pipeline.tokenizer.model_max_length)}
    lengths["T5 (--max_sequence_length)"] = (pipeline.tokenizer_2, args.max_sequence_length)
    for encoder, (tokenizer, limit) in lengths.items():
        cut = [repr(prompt[:60]) for prompt in prompts if len(tokenizer(prompt).input_ids) > limit]
        if cut:
            logger.info(f"{len(cut)} prompts are cut: {encoder} reads {limit} tokens of {shorten(cut, 5)}")
    encoded = {}
    hidden = not accelerator.is_main_process or None  # None: where there is no terminal
    for prompt in tqdm(mine, desc="Encoding prompts", leave=False, delay=2, disable=hidden):
        embeds, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=args.max_sequence_length)
        clip_ids = pipeline.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        encoded[prompt] = PromptEmbeds(embeds[0].cpu(), pooled[0].cpu(), clip_ids[0])
    return gather_dicts(encoded)


def load_vae(args: Namespace, accelerator: Accelerator) -> AutoencoderKL:
    """The frozen VAE: bfloat16 in a bf16 run, else float32 (in float16 its activations overflow)."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    vae = from_base(AutoencoderKL, args, subfolder="vae", dtype=dtype)
    return vae.requires_grad_(False).eval().to(accelerator.device)


class LatentDistribution(NamedTuple):
    """What the VAE makes of pixels: mean and standard deviation, each (..., C, H, W), float32, before scaling."""

    mean: Tensor
    std: Tensor


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: Tensor) -> LatentDistribution:
    """The posterior over latents of pixels (B, 3, 8H, 8W) in [-1, 1]: mean and deviation, (B, C, H, W)."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return LatentDistribution(posterior.mean.float(), posterior.std.float())


def sample_latents(distribution: LatentDistribution, noise: Tensor, vae_config: Any) -> Tensor:
    """A draw from the posterior, scaled as the transformer wants it: (B, C, H, W)."""
    sample = distribution.mean + distribution.std * noise
    return (sample - vae_config.shift_factor) * vae_config.scaling_factor


# ===================================== 5. What is trained, and in which precision =====================================


def load_transformer(args: Namespace, accelerator: Accelerator) -> FluxTransformer2DModel:
    """The transformer, all of it trainable, in float32, or in bfloat16 with `--full_bf16`."""
    transformer = read_transformer(args, accelerator, torch.bfloat16 if args.full_bf16 else torch.float32)
    set_up_blocks(args, transformer)
    return transformer.requires_grad_(True).train()


def load_text_encoder(args: Namespace) -> CLIPTextModel:
    """CLIP, all of it trainable, in float32."""
    text_encoder = from_base(CLIPTextModel, args, subfolder="text_encoder", dtype=torch.float32)
    if args.gradient_checkpointing:
        text_encoder.activation_checkpointing_enable()
    return text_encoder.requires_grad_(True).train()


# ============================================= 6. Optimizer and schedule ==============================================


class OptimizerEntry(NamedTuple):
    """What is known of an optimizer. It gets `--learning_rate`, weight decay and its `settings`."""

    module: str  # where its class is, imported when it is asked for; the package must be installed
    name: str
    settings: Callable[[Namespace, str], dict[str, Any]]  # what its class takes besides; when resuming, the flags win
    engines: tuple[DistributedType, ...] = ()  # that shard the model and can run it; others refuse it
    whole: bool = False  # whether it can only step all parameters at once, with one learning rate


def adam_settings(args: Namespace) -> dict[str, Any]:
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


PRODIGY_SETTINGS = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")  # on which torch has an AdamW in one kernel
OPTIMIZERS = {  # by the name that --optimizer takes
    "AdamW": OptimizerEntry(
        "torch.optim", "AdamW", lambda args, device: adam_settings(args) | {"fused": device in FUSED_DEVICES},
        engines=(DistributedType.FSDP, DistributedType.DEEPSPEED),
    ),
    "AdamW8bit": OptimizerEntry(
        "bitsandbytes.optim", "AdamW8bit", lambda args, _: adam_settings(args), engines=(DistributedType.DEEPSPEED,)
    ),
    "adafactor": OptimizerEntry(  # the learning rate is what the user says
        "transformers.optimization", "Adafactor", lambda args, _: {"scale_parameter": False, "relative_step": False}
    ),
    "prodigy": OptimizerEntry(
        "prodigyopt", "Prodigy", whole=True, settings=lambda args, _:
            adam_settings(args) | {name: getattr(args, f"prodigy_{name}") for name in PRODIGY_SETTINGS},
    ),
}  # fmt: skip


def chosen_optimizer(args: Namespace) -> OptimizerEntry:
    """The entry of `--optimizer`, in any case; `--use_8bit_adam` makes it AdamW8bit."""
    name = "adamw8bit" if args.use_8bit_adam and args.optimizer.lower() == "adamw" else args.optimizer.lower()
    return {known.lower(): entry for known, entry in OPTIMIZERS.items()}[name]


def parameter_groups(args: Namespace, transformer: nn.Module, text_encoder: nn.Module | None) -> list[dict]:
    """The trainable parameters with their learning rates and weight decays."""
    groups = [{"params": transformer, "lr": args.learning_rate, "weight_decay": args.adam_weight_decay}]
    if text_encoder is not None:
        lr = args.learning_rate if chosen_optimizer(args).whole else args.text_encoder_lr
        groups.append({"params": text_encoder, "lr": lr, "weight_decay": args.adam_weight_decay_text_encoder})
    for group in groups:
        group["params"] = [parameter for parameter in group["params"].parameters() if parameter.requires_grad]
    return groups


def make_optimizer(args: Namespace, groups: list[dict]) -> torch.optim.Optimizer:
    entry, [weight, *_] = chosen_optimizer(args), itertools.chain.from_iterable(group["params"] for group in groups)
    make = getattr(importlib.import_module(entry.module), entry.name)
    if entry.module.startswith("bitsandbytes"):  # it waits for the device after each weight, for paged ones: add none
        importlib.import_module("bitsandbytes.optim.optimizer").sync_gpu = lambda _: None  # type: ignore[attr-defined]
    return make(groups, lr=args.learning_rate, **entry.settings(args, weight.device.type))


# =================================================== 7. Validation ====================================================


def validate(run: Run) -> None:
    """What `--validation_loss` and `--validation_prompt` ask for, from the live model or the average of its weights."""
    args, state = run.args, run.state
    wants_pictures = bool(args.validation_prompt) and (state.step > 0 or args.validation_steps)
    if not (args.validation_loss or wants_pictures):
        return
    with run.trained.averaged():
        if args.validation_loss:
            loss = validation_loss(run)
            values, text = {"validation_loss": loss}, f"Validation loss at step {state.step}: {loss:.5f}"
            if state.step == 0:
                state.untrained_loss = loss
            if state.untrained_loss is not None:
                values["validation_loss_relative"] = loss / state.untrained_loss
                text += f", {values['validation_loss_relative']:.4f} of the untrained model's"
            logger.info(text)
            with tracking(run.accelerator):
                run.accelerator.log(values, step=state.step)
        if wants_pictures:
            draw_validation_pictures(run)


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """Mean of the training's loss over the validation pictures at fixed, equally spaced sigmas and fixed noise.

    Unlike the training loss, whose sigmas and noise are drawn anew, it compares from step to step and run to run.
    """
    accelerator, data, device = run.accelerator, run.data, run.accelerator.device
    transformer, count = unwrap(run.trained.transformer), len(data.validation)
    guidance = make_guidance(transformer, run.args.guidance_scale, 1, device)
    total = torch.zeros((), device=device)
    transformer.eval()
    for number in own_share(accelerator, count):
        prompt, latents, token_weights = data.validation[number % count]
        token_weights = None if token_weights is None else token_weights[None].to(device)
        embeds = embed_prompt(accelerator, run.trained.text_encoder, data.prompts[prompt])
        text, pooled = embeds.prompt_embeds[None].to(device), embeds.pooled_prompt_embeds[None].to(device)
        for level in range(VALIDATION_SIGMAS):
            sigmas = torch.full((1,), (level + 0.5) / VALIDATION_SIGMAS, device=device)
            noise = draw_normal(latents.shape[1:], 0, "validation", [(number, level)]).to(device)
            one = torch.full((1,), float(number < count), device=device)  # 0 for a filler, see `own_share`
            inputs = StepInputs(
                latents=latents.to(device), noise=noise, sigmas=sigmas, prompt_embeds=text,
                pooled_prompt_embeds=pooled, guidance=guidance, loss_weights=one, options=run.args,
                token_weights=token_weights,
            )  # fmt: skip
            total += training_loss(transformer, inputs)
    transformer.train()
    return accelerator.reduce(total, reduction="sum").item() / (count * VALIDATION_SIGMAS)


def draw_validation_pictures(run: Run) -> None:
    """Draw pictures from the live model, into `output_dir/validation`, the contact sheet and the trackers."""
    args, accelerator, data, state = run.args, run.accelerator, run.data, run.state
    prompts = [data.prompts[prompt] for prompt in args.validation_prompt]
    embeds = [embed_prompt(accelerator, run.trained.text_encoder, prompt) for prompt in prompts]
    transformer, vae = unwrap(run.trained.transformer), data.vae.to(accelerator.device)
    numbers = own_share(accelerator, args.num_validation_images * len(embeds))
    rest = (state.seed, numbers, "Validation", run.asked_to_stop)
    mine = sample_pictures(args, accelerator, transformer, vae, embeds, *rest)
    pictures = [picture for _, picture in sorted(gather_dicts(mine).items())]
    if data.dataset.cached is not None:  # the training does not need it in between
        vae.to("cpu")
    if accelerator.is_main_process and len(pictures) == args.num_validation_images * len(embeds):  # else: cut short
        folder = Path(args.output_dir) / "validation"
        with warn_if_unwritable("The validation pictures"):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            for number, picture in enumerate(pictures):
                save_picture(picture, folder / f"step_{state.step:06d}_{number}.png")
            save_picture(draw_contact_sheet(args, state.step), Path(args.output_dir) / SHEET_FILE)
        log_pictures(args, accelerator, "validation", pictures, state.step)
    accelerator.wait_for_everyone()


def sample_pictures(
    args: Namespace,
    accelerator: Accelerator,
    transformer: FluxTransformer2DModel,
    vae: AutoencoderKL,
    embeds: list[PromptEmbeds],
    seed: int,
    numbers: range,
    desc: str,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[int, Image.Image]:
    """Draw the pictures of these numbers, `--num_validation_images` of each prompt, from the same noise every time.

    Numbers beyond the last are fillers, which only keep the processes of a sharded model in step.
    """
    images, count = args.num_validation_images, args.num_validation_images * len(embeds)
    guidance, steps = args.validation_guidance_scale, args.validation_num_inference_steps
    options = {"guidance_scale": guidance, "num_inference_steps": steps}
    was_training = transformer.training  # in training autocast casts float32 inputs; a loaded pipeline needs its own
    dtype = torch.float32 if was_training else transformer.dtype
    sampler, pictures = make_sampler(args, transformer.eval()), {}
    for number in tqdm(numbers, desc=desc, leave=False, disable=not accelerator.is_local_main_process or None):
        if asked_to_stop():
            break
        prompt, noise = embeds[number % count // images], generator_for(seed, "validation", number % images)
        [picture] = draw_pictures(sampler, vae, [prompt], validation_size(args), dtype, [noise], **options)
        if number < count:
            pictures[number] = picture
    transformer.train(was_training)
    return pictures


# ============================== You can stop reading here: what follows is the plumbing. ==============================


class UsageError(ValueError):
    """Something that the user gave cannot work; exit code 2. The message says what, where, and the way out."""


class RunError(RuntimeError):
    """The run cannot go on; exit code 1. The message says why, what is kept, and the way out."""


# ============================================= 8. Flags and their checks ==============================================

INTERPOLATIONS = ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
NO_BACKWARD = re.compile("sage|_flash_3$")  # attention back-ends that cannot train
ATTENTION_BACKENDS = [kind.value for kind in AttentionBackendName if not NO_BACKWARD.search(kind.value)]
SCHEDULES = [kind.value for kind in SchedulerType]
WEIGHTING_SCHEMES = ["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"]
BOUNDS = {  # of numbers, as flags name them
    "ge": (operator.ge, "{} or more"), "gt": (operator.gt, "above {}"),
    "le": (operator.le, "at most {}"), "lt": (operator.lt, "below {}"),
}  # fmt: skip


FOLDER = os.path.expanduser  # a kind of value: a path, in whose --flag=~/folder no shell has replaced the ~


def parse_resolution(text: str) -> int | list[int]:
    """The value of `--resolution`: a side, or several."""
    sides = [int(side) for side in text.split(",")]
    return sides if len(sides) > 1 else sides[0]


def parse_flow_shift(text: str) -> float | str | None:
    """The value of `--flow_shift`: a number, "dynamic", or None for "none"."""
    with contextlib.suppress(ValueError):
        if text in ("none", "dynamic") or 0 < float(text) < math.inf:
            return {"none": None, "dynamic": text}[text] if text.isalpha() else float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither none nor dynamic nor a number above 0")


@dataclass(frozen=True)
class Flag:
    """A flag and all that is known of it; checks, help and what a resumed run does follow from it."""

    name: str
    kind: Any = str  # of its value; bool for a switch, list for a text that may be given several times
    default: Any = None
    help: str = ""
    choices: list[str] | None = None
    required: bool = False
    ge: float | None = None  # bounds of a number: at least, above, at most, below
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    needs: tuple[str, ...] = ()  # other flags that it requires
    packages: tuple[tuple[str, str], ...] = ()  # of its values, or "" for any: the package that it needs
    sharded: bool = True  # whether FSDP2 and DeepSpeed can do it
    # What a run that goes on from a checkpoint does where it differs. "free": nothing. "result": training is the same,
    # but a finished run makes its result again. "pictures": the same, and validation pictures are moved aside. "warn":
    # go on, and say so. "refuse": the weights or the optimizer's state would not fit.
    resume: str = "warn"

    @property
    def dest(self) -> str:
        return self.name[2:]

    @property
    def unset(self) -> Any:
        """Its value where it is not given."""
        return False if self.kind is bool else self.default

    def add_to(self, parser: Any) -> None:
        shown = "" if self.default in (None, False) else " (default: %(default)s)"
        options: dict[str, Any] = {"help": self.help + shown, "default": self.unset}
        if self.kind is bool:
            options |= {"action": "store_true"}
        elif self.kind is list:
            options |= {"action": "append"}
        else:
            options |= {"type": self.kind, "choices": self.choices, "required": self.required}
        parser.add_argument(self.name, **options)

    def is_on(self, args: Namespace) -> bool:
        return getattr(args, self.dest, self.unset) not in ("", self.unset)

    def problems(self, args: Namespace) -> Iterator[str]:
        value = getattr(args, self.dest)
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{self.name} is {value}; give a finite number"
        bounds = {kind: getattr(self, kind) for kind in BOUNDS if getattr(self, kind) is not None}
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not all(BOUNDS[kind][0](number, bounds[kind]) for kind in bounds):
                wanted = " and ".join(BOUNDS[kind][1].format(bound) for kind, bound in bounds.items())
                yield f"{self.name} is {number}; give {wanted}"
        for other in self.needs:
            if self.is_on(args) and not getattr(args, other[2:]):
                yield f"{self.name} needs {other}: give it too, or leave {self.name} out"
        for needing, package in self.packages:
            if (self.is_on(args) if needing == "" else value == needing) and find_spec(package) is None:
                given = f"{self.name}={needing}" if needing else self.name
                yield f"{given} needs the package {package}: pip install {package}, or give {self.name} otherwise"


# The flags that both scripts have, by the groups of --help. One that is added has a line here or in OWN_FLAGS.
FLAGS = {
    "model": [
        Flag("--pretrained_model_name_or_path", FOLDER, required=True, help="FLUX.1 on the Hub, or a diffusers folder"),
        Flag("--revision", help="branch, tag or commit of the checkpoint on the Hub"),
        Flag("--variant", help="variant of the weight files, for example fp16"),
        Flag("--cache_dir", FOLDER, help="where downloaded models and datasets are kept", resume="free"),
    ],
    "pictures and captions": [
        Flag("--instance_data_dir", FOLDER, help="folder with the pictures of the subject", resume="result"),
        Flag("--dataset_name", FOLDER, help="dataset instead: a Hub name or a folder", packages=(("", "datasets"),)),
        Flag("--dataset_config_name", help="configuration of the dataset, if it has several"),
        Flag("--image_column", default="image", help="column of the dataset with the pictures"),
        Flag("--caption_column", help="column of the dataset with the captions"),
        Flag("--caption_extension", help="caption files beside the pictures of the folder, for example .txt"),
        Flag("--caption_dropout", float, 0.0, "share of prompts to leave empty", ge=0, lt=1),
        Flag("--instance_prompt", help="prompt with a rare word for pictures without a caption"),
        Flag("--trigger_word", help="what {trigger} in prompts stands for; captions without it get it in front"),
        Flag("--mask_data_dir", FOLDER, help="folder of masks named like the pictures: white counts fully"),
        Flag("--alpha_mask", bool, help="take each picture's own transparency as its mask"),
        Flag("--unmasked_weight", float, 0.1, "weight of the loss where a mask is black", ge=0, le=1),
        Flag("--repeats", int, 1, "how often each picture is seen in an epoch", ge=1),
        Flag("--resolution", parse_resolution, 512, "side of the square in pixels; several: each picture is trained at "
             "all that it has pixels for, 512,768 for example", ge=PIXELS_PER_TOKEN),
        Flag("--aspect_ratio_buckets", help="crop to one of 'height,width;...', or auto"),
        Flag("--center_crop", bool, help="crop the centre; else a new random crop each epoch"),
        Flag("--random_flip", bool, help="mirror half of the pictures, drawn anew each epoch"),
        Flag("--image_interpolation_mode", default="lanczos", choices=INTERPOLATIONS, help="resize filter"),
        Flag("--dataloader_num_workers", int, 0, "processes that load pictures; 0: none", ge=0, resume="free"),
        Flag("--cache_latents", bool, help="encode each picture once, with one crop, and free the VAE"),
        Flag("--cached_views", int, 1, "crops of each picture to keep; an epoch takes one", ge=1,
             needs=("--cache_latents",)),
    ],
    "prior preservation": [
        Flag("--with_prior_preservation", bool, help="train on pictures of the class as well",
             needs=("--class_data_dir", "--class_prompt")),
        Flag("--class_data_dir", FOLDER, help="folder of class pictures; missing ones are generated", resume="result"),
        Flag("--class_prompt", help="prompt of the class, for example 'a photo of a dog'"),
        Flag("--num_class_images", int, 100, "class pictures that there should be", ge=1),
        Flag("--prior_loss_weight", float, 1.0, "weight of the prior's loss", ge=0),
        Flag("--sample_batch_size", int, 4, "class pictures generated at a time", ge=1, resume="free"),
        Flag("--prior_generation_precision", choices=list(PRECISIONS),
             help="precision of drawing class pictures (default: bf16 on a GPU, else fp32)"),
    ],
    "training": [
        Flag("--train_text_encoder", bool, help="train CLIP too (T5 always stays frozen)", sharded=False,
             resume="refuse"),
        Flag("--init_lora", FOLDER, help="LoRA to start from, whatever its scale: file, folder or Hub name"),
        Flag("--train_batch_size", int, 4, "pictures per process and micro-batch", ge=1),
        Flag("--gradient_accumulation_steps", int, 1, "micro-batches per optimizer step", ge=1),
        Flag("--num_train_epochs", int, 1, "passes over the pictures", ge=1, resume="free"),
        Flag("--max_train_steps", int, help="optimizer steps; wins over --num_train_epochs", ge=1, resume="result"),
        Flag("--seed", int, help="makes the run repeatable (default: drawn, logged and kept)", resume="free"),
        Flag("--local_rank", int, -1, "set by launchers; the environment's value wins", resume="free"),
    ],
    "memory and speed": [
        Flag("--gradient_checkpointing", bool, help="recompute activations to save memory", resume="free"),
        Flag("--gradient_checkpointing_blocks", int, help="number of blocks that are recomputed (default: all)", ge=0,
             needs=("--gradient_checkpointing",), resume="free"),
        Flag("--mixed_precision", choices=["no", "fp16", "bf16"],
             help="of the computation and of what is frozen (default: what `accelerate config` says)"),
        Flag("--allow_tf32", bool, help="float32 products in TF32 on Ampere and newer"),
        Flag("--attention_backend", choices=ATTENTION_BACKENDS, help="diffusers' name of it (default: torch's choice)"),
        Flag("--enable_npu_flash_attention", bool, help="attention of an Ascend NPU", packages=(("", "torch_npu"),)),
    ],
    "flow matching and prompts": [
        Flag("--guidance_scale", float, 3.5, "guidance input of the model in training; give 1 for FLUX.1 [dev]"),
        Flag("--weighting_scheme", default="none", choices=WEIGHTING_SCHEMES, help="how sigmas are drawn or weighted"),
        Flag("--flow_shift", parse_flow_shift, help="none, dynamic, or a number above 0 (above 1: more noise)"),
        Flag("--logit_mean", float, 0.0, "mean for --weighting_scheme=logit_normal"),
        Flag("--logit_std", float, 1.0, "deviation for --weighting_scheme=logit_normal", gt=0),
        Flag("--mode_scale", float, 1.29, "scale for --weighting_scheme=mode"),
        Flag("--max_sequence_length", int, TEXT_LENGTH, "tokens of a prompt that T5 reads", ge=1, le=512),
    ],
    "optimizer and schedule": [
        Flag("--optimizer", default="AdamW", help=", ".join(OPTIMIZERS), resume="refuse"),
        Flag("--use_8bit_adam", bool, help="AdamW with 8-bit state", resume="refuse"),
        Flag("--learning_rate", float, 1e-4, "learning rate of the transformer; 1 for prodigy", ge=0),
        Flag("--text_encoder_lr", float, 5e-6, "learning rate of CLIP; prodigy takes --learning_rate", ge=0),
        Flag("--scale_lr", bool, help="multiply the learning rate by processes x accumulation x batch size"),
        Flag("--lr_scheduler", default="constant", choices=SCHEDULES, help="schedule of the learning rate"),
        Flag("--lr_warmup_steps", int, 500, "warm-up, where the schedule has one", ge=0),
        Flag("--lr_num_cycles", int, 1, "restarts of cosine_with_restarts", ge=1),
        Flag("--lr_power", float, 1.0, "power of the polynomial schedule", ge=0),
        Flag("--lr_step_rules", help="steps of piecewise_constant: '1:100,0.1:300,0.01', factor:until step,...,factor"),
        Flag("--adam_beta1", float, 0.9, "decay of the gradient's mean", ge=0, lt=1),
        Flag("--adam_beta2", float, 0.999, "decay of the gradient's square", ge=0, lt=1),
        Flag("--adam_weight_decay", float, 1e-4, "weight decay of the transformer", ge=0),
        Flag("--adam_weight_decay_text_encoder", float, 1e-3, "weight decay of CLIP", ge=0),
        Flag("--adam_epsilon", float, 1e-8, "added to the denominator of Adam's step", gt=0),
        Flag("--max_grad_norm", float, 1.0, "norm that gradients are clipped to; 0: not clipped", ge=0),
        Flag("--prodigy_beta3", float, help="decay of Prodigy's estimate (default: sqrt(beta2))", ge=0, lt=1),
        Flag("--prodigy_decouple", string_to_bool, True, "decoupled weight decay, as in AdamW"),
        Flag("--prodigy_use_bias_correction", string_to_bool, True, "Adam's bias correction"),
        Flag("--prodigy_safeguard_warmup", string_to_bool, True, "use with a learning-rate warm-up"),
        Flag("--use_ema", bool, help="average the weights; validation and the result use it", sharded=False,
             resume="refuse"),
        Flag("--ema_decay", float, 0.99, "about the last 1 / (1 - decay) steps count, at most a ninth of those done",
             ge=0, lt=1),
    ],
    "validation": [
        Flag("--validation_prompt", list, help="prompt of pictures; may be given several times", resume="pictures"),
        Flag("--num_validation_images", int, 4, "pictures of each prompt each time", ge=1, resume="pictures"),
        Flag("--validation_epochs", int, 50, "after the first epoch, then every so many", ge=1, resume="free"),
        Flag("--validation_steps", int, help="also at the start, then every so many steps", ge=1, resume="free"),
        Flag("--validation_resolution", help="side of the pictures, or 1024x768 (default: that of the training)",
             resume="pictures"),
        Flag("--validation_guidance_scale", float, 3.5, "guidance of validation pictures", ge=0, resume="result"),
        Flag("--validation_num_inference_steps", int, 28, "sampling steps of the pictures", ge=1, resume="result"),
        Flag("--skip_final_inference", bool, help="draw no pictures from the saved result", resume="result"),
        Flag("--validation_loss", bool, help="log the loss at fixed noise and sigmas as well", resume="result"),
        Flag("--validation_data_dir", FOLDER, help="held-out pictures for it (default: those of the training)",
             needs=("--validation_loss",), resume="result"),
    ],
    "output, checkpoints and the Hub": [
        Flag("--output_dir", FOLDER, OUTPUT_DIR, help="where everything is written", resume="free"),
        Flag("--logging_dir", default="logs", help="folder of the trackers, inside --output_dir", resume="free"),
        Flag("--report_to", default="tensorboard", help="tensorboard, wandb, all, none, ...", resume="free",
             packages=(("tensorboard", "tensorboard"), ("wandb", "wandb"),)),
        Flag("--checkpointing_steps", int, 500, "steps between two checkpoints", ge=1, resume="free"),
        Flag("--checkpoints_total_limit", int, help="how many to keep (default: all)", ge=1, resume="free"),
        Flag("--resume_from_checkpoint", FOLDER, help="latest, or a checkpoint's name or path", resume="free"),
        Flag("--upcast_before_saving", bool, help="save the result in float32", resume="result"),
        Flag("--push_to_hub", bool, help="upload the result to the Hub; a new repository is public", resume="free"),
        Flag("--hub_model_id", help="repository (default: the name of --output_dir)", resume="free"),
        Flag("--hub_token", help="token for the Hub (default: that of `hf auth login`)", resume="free"),
    ],
}  # fmt: skip
OWN_FLAGS = {  # of this script
    "memory and speed": [
        Flag("--full_bf16", bool, help="weights in bf16 alone, updates rounded stochastically", sharded=False,
             resume="refuse"),
        Flag("--fused_backward_pass", bool, sharded=False, resume="refuse",
             help="update each weight as soon as it has its gradient, and free that; clips each tensor by itself"),
    ],
    "output, checkpoints and the Hub": [
        Flag("--save_single_file", bool, help="write the transformer into one file as well, in bf16", resume="result"),
    ],
}  # fmt: skip
LESS_MEMORY = "--use_8bit_adam, --full_bf16, --fused_backward_pass, --optimizer=adafactor"
FLAG_GROUPS = {title: [*FLAGS.get(title, []), *OWN_FLAGS.get(title, [])] for title in FLAGS | OWN_FLAGS}
FLAG_OF = {flag.dest: flag for group in FLAG_GROUPS.values() for flag in group}


def make_parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").partition("\n")[0]
    usage = "%(prog)s [flags] [@file with flags]; all of them: --help"
    parser = argparse.ArgumentParser(usage=usage, description=description)
    for title, flags in FLAG_GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            flag.add_to(group)
    return parser


def read_words(words: Iterable[str]) -> Iterator[str]:
    """A command line, with the flags in FILE in the place of @FILE, quoted as in a shell, with # for comments."""
    for before, word in itertools.pairwise(["", *words]):
        if not word.startswith("@") or not os.path.isfile(word[1:]):  # noqa: PTH113  a prompt may begin with @, and be long
            if word.startswith("@") and not re.fullmatch(r"--\w+", before):  # where no value is due
                raise UsageError(f"{word}: there is no file {word[1:]}")
            yield word
            continue
        line = ""
        try:
            for line in Path(word[1:]).read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines():
                plain = re.sub(r"""(\\.|"(?:\\.|[^"\\])*"|'[^']*')|(?<!\S)#.*""", lambda found: found[1] or "", line)
                yield from read_words(shlex.split(plain))
        except UsageError:
            raise
        except (OSError, ValueError) as error:
            raise UsageError(f"{word}: {error}; quote as in a shell: {line}") from error


def problems(args: Namespace) -> Iterator[str]:
    """What is wrong with the flags: each alone, with its companions, and with others."""
    for flag in FLAG_OF.values():
        yield from flag.problems(args)
    captions = args.caption_column or args.caption_extension
    prompts = filter(None, (args.instance_prompt, args.class_prompt, *(args.validation_prompt or [])))
    buckets, rules = args.aspect_ratio_buckets or "auto", args.lr_step_rules or "1"
    whole = all(whole_tokens(int(side)) == int(side) for side in re.findall(r"\d+", buckets))
    known = args.optimizer.lower() in map(str.lower, OPTIMIZERS)
    package = chosen_optimizer(args).module.split(".")[0] if known else "torch"
    optimizer = f"--optimizer={args.optimizer}" + " --use_8bit_adam" * args.use_8bit_adam
    wrong = {
        "no pictures: give --instance_data_dir FOLDER or --dataset_name NAME":
            not args.instance_data_dir and not args.dataset_name,
        "--instance_data_dir and --dataset_name are both given; give one of them":
            args.instance_data_dir and args.dataset_name,
        "no prompts: give --instance_prompt, or --caption_column or --caption_extension for captions":
            not args.instance_prompt and not captions,
        "--caption_column is for --dataset_name, which may be a folder with metadata.jsonl or metadata.csv; "
        "beside --instance_data_dir captions are files: give --caption_extension":
            args.caption_column and args.instance_data_dir and not args.dataset_name,
        "--caption_extension is for --instance_data_dir; for a dataset give --caption_column":
            args.caption_extension and args.dataset_name and not args.validation_data_dir,
        f"--caption_extension is {args.caption_extension!r}; give the end of the files' names, such as .txt":
            not re.fullmatch(r"\.\w+", args.caption_extension or ".txt"),
        f"--aspect_ratio_buckets is {buckets!r}; give auto, or height,width;height,width in multiples of "
        f"{PIXELS_PER_TOKEN}":
            not whole or not re.fullmatch(r"auto|\d+,\d+(;\d+,\d+)*", buckets),
        "--aspect_ratio_buckets names sizes of its own; with several of --resolution give auto":
            isinstance(args.resolution, list) and args.aspect_ratio_buckets not in (None, "", "auto"),
        f"--validation_resolution is {args.validation_resolution!r}; give 1024 or 1024x768, in multiples of 16":
            not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", args.validation_resolution or "1")
            or any(int(side) % PIXELS_PER_TOKEN for side in re.findall(r"\d+", args.validation_resolution or "")),
        "{trigger} in a prompt stands for --trigger_word; give it":
            not args.trigger_word and any("{trigger}" in prompt for prompt in prompts),
        "--mask_data_dir and --alpha_mask are both given; give one of them": args.mask_data_dir and args.alpha_mask,
        "--mask_data_dir needs --instance_data_dir; for a dataset give --alpha_mask":
            args.mask_data_dir and args.dataset_name,
        "--validation_steps needs --validation_prompt or --validation_loss":
            args.validation_steps and not (args.validation_prompt or args.validation_loss),
        f"--optimizer is {args.optimizer!r}; give {', '.join(OPTIMIZERS)}": not known,
        f"{optimizer} needs the package {package}: pip install {package}":
            package not in ("torch", "transformers") and find_spec(package) is None,
        "prodigy needs --learning_rate, for example 1": package == "prodigyopt" and not args.learning_rate,
        f"--learning_rate is {args.learning_rate}, and --lr_scheduler=polynomial ends at 1e-7; give more":
            args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7,
        "--lr_scheduler=piecewise_constant needs --lr_step_rules, for example '1:100,0.1:300,0.01'":
            args.lr_scheduler == "piecewise_constant" and not args.lr_step_rules,
        f"--lr_step_rules is {rules!r}; give factor:step,...,factor, such as '1:100,0.1:300,0.01'":
            not re.fullmatch(r"(N:\d+,)*N".replace("N", r"\d*\.?\d+(e-?\d+)?"), rules),
        f"--hub_model_id is {args.hub_model_id!r}; give NAME or OWNER/NAME":
            (args.hub_model_id or "").count("/") > 1,
        "--enable_npu_flash_attention is --attention_backend=_native_npu; give one of them":
            args.attention_backend and args.enable_npu_flash_attention,
    } | own_contradictions(args)  # fmt: skip
    yield from (message for message, is_so in wrong.items() if is_so)
    yield from name_problems(args)


def name_problems(args: Namespace) -> Iterator[str]:
    """Paths and prompts that are almost certainly mistakes."""
    if not args.output_dir.strip():
        yield "--output_dir is empty; give a folder"
    base, data = "pretrained_model_name_or_path", ("instance_data_dir", "validation_data_dir", "dataset_name")
    written, masks = ("output_dir", "class_data_dir"), "mask_data_dir"
    for name, other in [*itertools.product(written, (*data, masks, base)), written, (masks, data[0])]:
        both = [os.path.realpath(getattr(args, flag)) for flag in (name, other) if getattr(args, flag)]
        if len(both) == 2 and both[0] == both[1]:
            yield f"--{name} and --{other} are the same folder, {getattr(args, name)!r}; give each one of its own"
    words = (args.trigger_word, getattr(args, "class_word", None), args.instance_prompt, args.class_prompt)
    for prompt in filter(None, (*words, *(args.validation_prompt or []))):
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # how Python holds what it could not decode
            yield f"the prompt or word {prompt!r} is not in UTF-8; write it in that"


def own_contradictions(args: Namespace) -> dict[str, Any]:
    """What cannot work together of this script's flags: a message, and whether it is so."""
    alone = args.full_bf16 or args.fused_backward_pass
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # as accelerate resolves it
    return {
        f"--full_bf16 needs --mixed_precision=bf16, and it, or else accelerate's configuration, says {precision}":
            args.full_bf16 and precision != "bf16",
        "--fused_backward_pass cannot scale losses as --mixed_precision=fp16 does; give bf16":
            args.fused_backward_pass and precision == "fp16",
        "--fused_backward_pass keeps no gradients to accumulate; give --gradient_accumulation_steps=1":
            args.fused_backward_pass and args.gradient_accumulation_steps > 1,
        f"{args.optimizer} needs all gradients at once; with --full_bf16 and --fused_backward_pass give AdamW or "
        "adafactor":
            alone and args.optimizer.lower() in map(str.lower, OPTIMIZERS) and chosen_optimizer(args).whole,
    }  # fmt: skip


def notes_on_args(args: Namespace) -> list[str]:
    """What works, but perhaps not as the user thinks."""
    prodigy, unused = args.optimizer.lower() == "prodigy", unused_captions(args)
    from_base = getattr(args, "prior_from_base_model", False)
    notes = {
        "--class_data_dir and --class_prompt have no effect without --with_prior_preservation":
            not args.with_prior_preservation and (args.class_data_dir or args.class_prompt) and not from_base,
        "--class_data_dir has no effect with --prior_from_base_model": args.class_data_dir and from_base,
        f"--use_8bit_adam has no effect with --optimizer={args.optimizer}":
            args.use_8bit_adam and not args.optimizer.lower().startswith("adamw"),
        f"--learning_rate={args.learning_rate} is low for prodigy, which finds the step size itself: use 1":
            prodigy and args.learning_rate <= 0.1,
        f"--learning_rate={args.learning_rate} is prodigy's; try 1e-4 for a LoRA, 1e-5 for all weights":
            not prodigy and args.learning_rate >= 0.1,
        f"prodigy has one learning rate: CLIP is trained with --learning_rate={args.learning_rate} too":
            prodigy and args.train_text_encoder,
        f"--resolution={args.resolution}: trained at {resolutions(args)}, multiples of {PIXELS_PER_TOKEN}":
            resolutions(args) not in (args.resolution, [args.resolution]),
        "--trigger_word has no effect: --instance_prompt has neither it nor {trigger}, and there are no captions":
            args.trigger_word and args.instance_prompt and not (args.caption_column or args.caption_extension)
            and not word_pattern(args.trigger_word).search(args.instance_prompt),
        "--hub_model_id has no effect without --push_to_hub": args.hub_model_id and not args.push_to_hub,
        "--cache_latents: each picture's crop and flip are drawn once, not anew each epoch; see --cached_views":
            args.cache_latents and args.cached_views == 1 and (args.random_flip or not args.center_crop),
        "no --caption_column: every picture is trained with --instance_prompt":
            args.dataset_name and not args.caption_column,
        "--aspect_ratio_buckets: class pictures, drawn square, are cropped to their instance picture's bucket":
            args.aspect_ratio_buckets and args.with_prior_preservation,
        f"captions found but ignored; give --caption_extension, or the folder as --dataset_name: {shorten(unused)}":
            unused,
    }  # fmt: skip
    return [message for message, is_so in notes.items() if is_so]


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line as a namespace; exits with code 2 and every problem found, a line each, if it cannot work."""
    parser = make_parser()
    args = parser.parse_args([*read_words(sys.argv[1:] if argv is None else argv)])
    args.validation_prompt = [prompt for prompt in args.validation_prompt or [] if prompt] or None
    args.hub_token = (args.hub_token or "").strip() or None  # as an unset variable gives it
    if found := list(problems(args)):
        parser.error("\n  ".join(found if len(found) == 1 else ["", *found]))
    if args.trigger_word:
        for name in ("instance_prompt", "class_prompt"):
            setattr(args, name, (getattr(args, name) or "").replace("{trigger}", args.trigger_word) or None)
        prompts = [prompt.replace("{trigger}", args.trigger_word) for prompt in args.validation_prompt or []]
        args.validation_prompt = prompts or None
    return args


def settings(args: Namespace) -> dict[str, Any]:
    """The flags as plain values, without the token: for trackers, checkpoints and the model card."""
    return {name: value for name, value in vars(args).items() if name != "hub_token"}


def flag_lines(args: Namespace) -> list[str]:
    """The flags that differ from their defaults, without the token, each as a line that `@file` reads."""
    lines = []
    for name, value in sorted(settings(args).items()):
        if value != FLAG_OF[name].unset:
            texts = value if isinstance(value, list) else [value]
            texts = texts if FLAG_OF[name].kind is list else [",".join(map(str, texts)) if len(texts) > 1 else value]
            texts = [text if text is True else " ".join(str(text).splitlines()) for text in texts]
            lines += [f"--{name}" + ("" if text is True else f"={shlex.quote(text)}") for text in texts]
    return lines


def changed_flags(before: dict[str, Any], args: Namespace, *kinds: str) -> list[str]:
    """The flags of these kinds of `resume` that differ from `before`; one that was not there yet had its default."""
    changed = []
    for name, flag in FLAG_OF.items():
        old, new = before.get(name, flag.unset), getattr(args, name)
        old = [old] if flag.kind is list and isinstance(old, str) else old  # as checkpoints of earlier versions have it
        same = str(old).lower() == str(new).lower() if flag.resume == "refuse" else old == new
        if flag.resume in kinds and not same and (old or new):
            changed.append(f"--{name} was {old!r} and is {new!r}")
    return changed


# ================================= 9. Pictures: finding, checking and reporting them ==================================

PICTURE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".mpo", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".ppm",
    ".tga",
}  # fmt: skip
TEXT_SUFFIXES = {".txt", ".caption", ".json", ".jsonl", ".csv", ".md"}  # nobody misses them among the pictures


def list_picture_files(folder: Path) -> list[Path]:
    """The picture files in `folder` by name, without hidden ones."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.suffix.lower() in PICTURE_SUFFIXES)


def shorten(names: list[str], most: int = 20) -> str:
    """The first names of a list for a message, and how many there are besides."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def open_folder(flag: str, folder: str) -> list[Path]:
    """The picture files in `folder`, the value of `flag`; a UsageError if it cannot be read."""
    try:
        return list_picture_files(Path(folder))
    except OSError as error:
        message = f"{flag} is {folder!r}, which is not a folder that can be read ({error.strerror})"
        raise UsageError(f"{message}; give the folder with the pictures") from error


def ignored_files(folder: Path, extension: str | None) -> list[str]:
    """What somebody may miss in a folder of pictures and captions: other files, folders, links to nothing."""
    used, texts = set(list_picture_files(folder)), {*TEXT_SUFFIXES, extension}
    others = (path for path in folder.iterdir() if path not in used and path.suffix.lower() not in texts)
    return sorted(path.name for path in others if not path.name.startswith("."))


def unused_captions(args: Namespace) -> list[str]:
    """Files in `--instance_data_dir` that look like captions of its pictures, when no flag asks for captions."""
    folder = Path(args.instance_data_dir or "")
    if args.instance_data_dir and not args.caption_extension:
        with contextlib.suppress(OSError):  # `list_pictures` will tell
            names = [path.with_suffix(".txt").name for path in list_picture_files(folder)]
            return [name for name in ("metadata.jsonl", "metadata.csv", *names) if (folder / name).is_file()]
    return []


def pictures_in_folder(flag: str, folder: str, prompt: str, extension: str | None = None) -> list[Picture]:
    """The pictures of `folder`, the value of `flag`, each with the text of its caption file, or else with `prompt`."""
    files, captions = open_folder(flag, folder), dict[Path, str]()
    if not files:
        raise UsageError(f"{flag} is {folder!r}, which has no picture files ({', '.join(sorted(PICTURE_SUFFIXES))})")
    for path in files if extension else []:
        file = path.with_suffix(str(extension))
        try:
            captions[path] = file.read_text(encoding="utf-8-sig").strip() if file.is_file() else ""
        except (OSError, ValueError) as error:
            message = f"--caption_extension={extension} needs text, in UTF-8; {file}: {type(error).__name__}: {error}"
            raise UsageError(message) from error
    missing = [path.name for path in files if not captions.get(path)]
    if missing and not prompt:
        message = f"{flag} is {folder!r}, where pictures have no caption{f' in {extension}' if extension else ''}"
        raise UsageError(f"{message}; write them, or give --instance_prompt for these: {shorten(missing)}")
    if missing and extension:
        logger.warning(f"In {folder} {len(missing)} pictures take --instance_prompt for a caption: {shorten(missing)}")
    opens = {path: functools.partial(Image.open, path) for path in files}
    return [Picture(f"{path.parent.name}/{path.name}", opens[path], captions.get(path) or prompt) for path in files]


def open_row(dataset: Any, row: int, column: str) -> Image.Image:
    image = dataset[row][column]
    if image is None:
        raise ValueError("the row has no picture")
    return image


def pictures_in_dataset(args: Namespace) -> list[Picture]:
    """The pictures of `--dataset_name`'s train split, each with its caption or the instance prompt."""
    from datasets import Image as ImageFeature  # optional: only this flag needs it
    from datasets import load_dataset

    try:
        dataset = load_dataset(
            args.dataset_name, args.dataset_config_name, split="train", cache_dir=args.cache_dir, token=args.hub_token
        )
    except Exception as error:  # the library raises many kinds; all of them mean that the name does not work
        raise UsageError(f"--dataset_name is {args.dataset_name!r}, which does not load: {error}") from error
    for flag, column in (("--image_column", args.image_column), ("--caption_column", args.caption_column)):
        if column is not None and column not in dataset.column_names:
            raise UsageError(f"{flag} is {column!r}; the dataset has the columns {', '.join(dataset.column_names)}")
    if not isinstance(dataset.features[args.image_column], ImageFeature):
        raise UsageError(f"--image_column is {args.image_column!r}, which does not hold pictures")
    if len(dataset) == 0:
        raise UsageError(f"--dataset_name is {args.dataset_name!r}, whose train split is empty")
    captions = list(dataset[args.caption_column]) if args.caption_column else [None] * len(dataset)
    wrong = [str(row) for row, caption in enumerate(captions) if not isinstance(caption, str | None)]
    if wrong:
        raise UsageError(f"--caption_column is {args.caption_column!r}, which has no text in row {shorten(wrong)}")
    captions = [(caption or "").strip() for caption in captions]
    missing = [str(row) for row, caption in enumerate(captions) if not caption]
    if missing and not args.instance_prompt:
        message = f"--caption_column is {args.caption_column!r}, which has no text in row {shorten(missing)}"
        raise UsageError(f"{message}; write it, or give --instance_prompt for these")
    if missing and args.caption_column:
        logger.warning(f"{len(missing)} pictures take --instance_prompt for a caption: rows {shorten(missing)}")
    names = (path.relative_to(args.dataset_name) for path in Path(args.dataset_name).rglob("*"))
    files = [name for name in names if name.suffix.lower() in PICTURE_SUFFIXES and "/." not in f"/{name.as_posix()}"]
    if len(files) > len(dataset):
        logger.warning(
            f"--dataset_name is {args.dataset_name!r}, of whose {len(files)} picture files {len(dataset)} are used: "
            "the others are not in its metadata, or a word in names (train, test, val, dev, eval) makes other splits"
        )
    images = dataset.select_columns(args.image_column)
    opens = [functools.partial(open_row, images, row, args.image_column) for row in range(len(dataset))]
    return [Picture(f"row {row}", opens[row], caption or args.instance_prompt) for row, caption in enumerate(captions)]


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Any picture as upright 8-bit RGB: EXIF orientation applied, 16 bits scaled to 8, transparency on `background`."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values, hidden = np.asarray(image).astype(np.float32), image.info.get("transparency")
        small = not image.mode.startswith("I;16") and values.max() <= 255
        white = 1.0 if values.max() <= 1 and image.mode == "F" else 255.0 if small else 65535.0
        image = Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8))
        if hidden is not None:  # the level that stands for transparency
            image.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def open_alpha(open_picture: Callable[[], Image.Image]) -> Image.Image:
    """The opacity of a picture, upright, in 8 bits."""
    with open_picture() as stored:
        return ImageOps.exif_transpose(stored).convert("RGBA").getchannel("A")


def open_mask(path: Path) -> Image.Image:
    with Image.open(path) as stored:
        return to_rgb(stored, "black").convert("L")  # what is transparent is not painted


def find_masks(args: Namespace, pictures: Pictures) -> Pictures:
    """The pictures of all sources with their masks, where there are any; a mask without a picture is named."""
    if args.alpha_mask:
        return {source: [replace(one, mask=functools.partial(open_alpha, one.open)) for one in part]
                for source, part in pictures.items()}  # fmt: skip
    files = open_folder("--mask_data_dir", args.mask_data_dir)
    masks = {path.stem: functools.partial(open_mask, path) for path in files}
    stems = [{Path(one.name).stem for one in part} for part in pictures.values()]
    if lost := sorted(masks.keys() - set().union(*stems)):
        logger.warning(f"--mask_data_dir has masks without a picture: {shorten(lost)}")
    if twice := sorted(masks.keys() & set.intersection(*stems)) if len(stems) > 1 else []:
        raise UsageError(
            f"--mask_data_dir has masks of pictures that are trained on and held out; rename: {shorten(twice)}"
        )
    return {source: [replace(one, mask=masks.get(Path(one.name).stem)) for one in part]
            for source, part in pictures.items()}  # fmt: skip


def check_pictures(pictures: list[Picture]) -> list[Picture]:
    """Decode every picture once, before anything expensive; returns them with their sizes and digests."""
    checked, broken = [], []
    for picture in tqdm(pictures, desc="Checking pictures", unit="picture", leave=False, delay=2, disable=None):
        try:
            image, mask = picture.read(), picture.mask and picture.mask()
            if mask and abs(math.log(mask.width / mask.height * image.height / image.width)) > 0.01:
                raise ValueError(f"the mask has {mask.size} pixels, the picture {image.size}: other proportions")
            digest = xxhash.xxh3_64_hexdigest(image.tobytes() + (mask.tobytes() if mask else b""))
            checked.append(replace(picture, size=image.size, digest=digest))
        except Exception as error:  # decoders raise what they like; all of it means that it cannot be read
            broken.append(f"{picture.name}: {error}")
    if broken:
        raise UsageError("pictures that cannot be read; replace or remove them:\n  " + "\n  ".join(broken))
    return checked


def resized_size(width: int, height: int, size: Size) -> Size:
    """Width and height of a picture that was resized to cover `size`, its aspect kept."""
    if width * size[1] <= height * size[0]:
        return size[0], int(size[0] * height / width)
    return int(size[1] * width / height), size[1]


def nearest_size(size: Size, sizes: list[Size]) -> Size:
    """Which of `sizes` is nearest to `size` in log aspect ratio, and among equals in log area; all width, height."""
    aspect, area = size[0] / size[1], math.prod(size)
    return min(sizes, key=lambda to: (abs(math.log(aspect / (to[0] / to[1]))), abs(math.log(area / math.prod(to)))))


def resolutions(args: Namespace) -> list[int]:
    """The sides of `--resolution` in whole tokens: what is beyond them the VAE and packing would cut off."""
    sides = args.resolution if isinstance(args.resolution, list) else [args.resolution]
    return list(dict.fromkeys(side // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN for side in sides))


def training_sizes(args: Namespace, resolution: int | None = None) -> list[Size]:
    """What pictures are cropped to at a resolution, by default the first: a square, or `--aspect_ratio_buckets`."""
    side = resolution or resolutions(args)[0]
    if not args.aspect_ratio_buckets:
        return [(side, side)]
    if args.aspect_ratio_buckets == "auto":
        roots = [math.sqrt(ratio) for ratio in ASPECT_RATIOS]
        wide = [(whole_tokens(side * root), whole_tokens(side / root)) for root in roots]
        return list(dict.fromkeys([*wide, *((width, height) for height, width in wide)]))
    pairs = (pair.split(",") for pair in args.aspect_ratio_buckets.split(";"))
    return [(int(width), int(height)) for height, width in pairs]


def validation_size(args: Namespace) -> Size:
    """What `--validation_resolution` says, or the first of `--resolution`."""
    sides = [int(side) for side in (args.validation_resolution or str(resolutions(args)[0])).split("x")]
    return sides[0], sides[-1]


def whole_tokens(pixels: float) -> int:
    """The nearest side that the transformer can take."""
    return max(1, round(pixels / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN


def report_pictures(source: str, pictures: list[Picture], sizes: list[Size]) -> None:
    """Log what pictures there are, how much of them a crop to the nearest of `sizes` loses, and which are enlarged."""
    cropped, enlarged = dict[Size, list[tuple[float, str]]](), []
    for picture in pictures:
        size = nearest_size(picture.size, sizes)
        width, height = resized_size(*picture.size, size)
        cropped.setdefault(size, []).append((100 - 100 * math.prod(size) / (width * height), picture.name))
        if width > picture.size[0]:
            enlarged.append("{} ({}x{})".format(picture.name, *picture.size))
    rows = [f"{len(pictures)} {source} pictures"]
    for (width, height), found in sorted(cropped.items()):
        mean = sum(share for share, _ in found) / len(found)
        names = shorten([f"{name} {share:.1f} %" for share, name in sorted(found)[::-1]])
        rows.append(f"{width}x{height}: {len(found)}, cropped by {mean:.1f} %: {names}")
    rows += [f"enlarged: {shorten(enlarged)}"] if enlarged else []
    logger.info("\n  ".join(rows))


def word_pattern(word: str) -> re.Pattern[str]:
    """Finds `word`, but not as a part of others: no "sks" in "desks"."""
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")


def with_trigger(args: Namespace, picture: Picture) -> Picture:
    """The picture, `--trigger_word` in its caption: in the place of {trigger}, or in front where it is missing."""
    word = args.trigger_word
    if not word and "{trigger}" in picture.prompt:
        raise UsageError(f"the caption of {picture.name} has {{trigger}}, which stands for --trigger_word; give it")
    if not word or picture.prompt == args.instance_prompt:
        return picture
    caption = picture.prompt.replace("{trigger}", word)
    return replace(picture, prompt=caption if word_pattern(word).search(caption) else f"{word} {caption}")


def list_pictures(args: Namespace) -> Pictures:
    """The pictures of the subject, those of the class that are there, and those held out; a UsageError without any."""
    captions = (args.instance_prompt, args.caption_extension)
    if args.dataset_name:
        pictures = {"instance": pictures_in_dataset(args)}
    else:
        pictures = {"instance": pictures_in_folder("--instance_data_dir", args.instance_data_dir, *captions)}
    if args.validation_data_dir:
        pictures["validation"] = pictures_in_folder("--validation_data_dir", args.validation_data_dir, *captions)
    if args.mask_data_dir or args.alpha_mask:
        pictures = find_masks(args, pictures)
    pictures = {source: [with_trigger(args, picture) for picture in part] for source, part in pictures.items()}
    class_flag, folder = "--class_data_dir", args.class_data_dir
    if args.with_prior_preservation and os.path.lexists(folder) and open_folder(class_flag, folder):
        pictures["class"] = pictures_in_folder(class_flag, folder, args.class_prompt)
    checked = iter(check_pictures([picture for part in pictures.values() for picture in part]))
    pictures = {source: [next(checked) for _ in part] for source, part in pictures.items()}
    for name in ("instance_data_dir", "validation_data_dir"):
        if getattr(args, name) and (others := ignored_files(Path(getattr(args, name)), args.caption_extension)):
            logger.warning(f"--{name} has files that are not pictures by their names, ignored: {shorten(others)}")
    for source, part in pictures.items():
        if source != "class" or not args.aspect_ratio_buckets:  # else each takes its instance picture's
            for resolution in resolutions(args):
                report_pictures(source, part, training_sizes(args, resolution))
        if masks := [np.asarray(picture.mask()).mean() / 2.55 for picture in part if picture.mask]:
            share = f"{min(masks):.0f} to {max(masks):.0f} % of their pictures"
            logger.info(f"{len(masks)} of {len(part)} {source} pictures have masks, which count {share} fully")
    return pictures


def generate_class_pictures(args: Namespace, accelerator: Accelerator, seed: int) -> None:
    """Draw the class pictures that are missing, at the training resolution, the processes sharing the work."""
    folder, held = Path(args.class_data_dir), len(HELD)
    if accelerator.is_main_process:
        lock_folder("--class_data_dir", folder, 3500)  # another run may draw them now; others wait two hours
        remove_leftovers(folder)
    accelerator.wait_for_everyone()
    missing = args.num_class_images - len(list_picture_files(folder))
    free = (number for number in range(2 * args.num_class_images) if not (folder / f"class_{number:05d}.png").exists())
    numbers = [next(free) for _ in range(missing)]
    accelerator.wait_for_everyone()  # nobody writes before all have counted
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    default = torch.float32 if accelerator.device.type == "cpu" else torch.bfloat16
    dtype = default if args.prior_generation_precision in (None, "no") else PRECISIONS[args.prior_generation_precision]
    encoded = encode_prompts(args, accelerator, [args.class_prompt][: len(numbers)], dtype)  # frees 10 GB of encoders
    if mine:
        sampler = make_sampler(args, load_base(args, dtype, accelerator.device))
        vae, size = load_vae(args, accelerator), (max(resolutions(args)),) * 2
        hidden = not accelerator.is_local_main_process or None  # None: where there is no terminal
        parts = [mine[start : start + args.sample_batch_size] for start in range(0, len(mine), args.sample_batch_size)]
        for part in tqdm(parts, desc="Generating class pictures", disable=hidden):
            noise = [generator_for(seed, "class picture", number) for number in part]
            prompts = [encoded[args.class_prompt]] * len(part)
            pictures = draw_pictures(sampler, vae, prompts, size, dtype, noise)
            for number, picture in zip(part, pictures, strict=True):
                save_picture(picture, folder / f"class_{number:05d}.png")
    accelerator.wait_for_everyone()
    unlock_folders(held)
    if len(list_picture_files(folder)) < args.num_class_images:
        raise UsageError(
            f"--class_data_dir is {args.class_data_dir!r}: each machine has drawn a part; share the folder"
        )


def prepare_dataset(args: Namespace, accelerator: Accelerator, pictures: Pictures, seed: int) -> DreamBoothDataset:
    """The examples, after the class pictures that are missing were drawn."""
    class_pictures: list[Picture] = []
    if args.with_prior_preservation:
        if len(pictures.get("class", [])) < args.num_class_images:
            with stage(args, accelerator, "Generating class pictures"):
                generate_class_pictures(args, accelerator, seed)
            found = pictures_in_folder("--class_data_dir", args.class_data_dir, args.class_prompt)
            pictures |= {"class": check_pictures(found)}
        class_pictures = pictures["class"]
    return DreamBoothDataset(pictures["instance"], class_pictures[: args.num_class_images], args, seed)


def make_sampler(args: Namespace, transformer: nn.Module) -> FluxPipeline:
    """The pipeline of an unwrapped transformer, which is used as it is, neither cast nor moved."""
    sampler = FluxPipeline(load_scheduler(args), None, None, None, None, None, transformer)
    sampler.set_progress_bar_config(disable=True)
    return sampler


@torch.no_grad()
def draw_pictures(
    sampler: FluxPipeline,
    vae: AutoencoderKL,
    prompts: list[PromptEmbeds],
    size: Size,
    dtype: torch.dtype,
    generators: list[torch.Generator],
    **options: Any,
) -> list[Image.Image]:
    """A picture of `size` for each prompt, from the noise of its generator; used for class and validation pictures.

    `dtype` is that of the prompts, `options` are the pipeline's.
    """
    latents = sampler(
        prompt_embeds=torch.stack([prompt.prompt_embeds for prompt in prompts]).to(vae.device, dtype),
        pooled_prompt_embeds=torch.stack([prompt.pooled_prompt_embeds for prompt in prompts]).to(vae.device, dtype),
        width=size[0],
        height=size[1],
        generator=generators,
        output_type="latent",
        **options,
    ).images
    latents = FluxPipeline._unpack_latents(latents, size[1], size[0], vae_scale_factor=8)
    latents = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.device, vae.dtype)
    decoded = [vae.decode(own[None]).sample.float() for own in latents]  # one by one: the VAE takes much memory
    return [sampler.image_processor.postprocess(pixels)[0] for pixels in decoded]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG or JPEG that is whole or not there."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    picture.save(partial, format="PNG" if path.suffix == ".png" else "JPEG", quality=92)
    replace_path(partial, path)


def log_pictures(args: Namespace, accelerator: Accelerator, name: str, pictures: list[Image.Image], step: int) -> None:
    with tracking(accelerator):
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                stack = np.stack([np.asarray(picture) for picture in pictures])
                tracker.log_images({name: stack}, step, dataformats="NHWC")
            elif tracker.name == "wandb":
                import wandb  # optional

                prompts = [prompt for prompt in args.validation_prompt for _ in range(args.num_validation_images)]
                shown = zip(pictures, prompts, strict=True)
                tracker.log({name: [wandb.Image(picture, caption=prompt) for picture, prompt in shown]}, step)
            elif tracker.name == "swanlab":
                tracker.log_images({name: pictures}, step)
            elif hasattr(tracker, "log_images"):  # a picture for each name
                tracker.log_images({f"{name}_{number}": picture for number, picture in enumerate(pictures)}, step)


@contextlib.contextmanager
def tracking(accelerator: Accelerator) -> Iterator[None]:
    """Around what the trackers do: where one fails, as on a full disk, a warning says so and the run goes on."""
    try:
        yield
    except Exception as error:  # each tracker has its own kinds
        logger.warning(f"--report_to: nothing more is logged, after {type(error).__name__}: {error}")
        accelerator.trackers.clear()


def end_training(accelerator: Accelerator) -> None:
    """End the trackers, and what ties the processes together."""
    with tracking(accelerator):
        for tracker in accelerator.trackers:
            tracker.finish()
    accelerator.trackers.clear()
    accelerator.end_training()


def list_validation_pictures(output_dir: Path) -> dict[tuple[int, int], Path]:
    """The pictures that were drawn on the way, by step and number."""
    paths = (output_dir / "validation").glob("step_*.png")
    found = ((re.fullmatch(r"step_(\d+)_(\d+)\.png", path.name), path) for path in paths)
    return {(int(match[1]), int(match[2])): path for match, path in found if match}


def draw_contact_sheet(args: Namespace, step: int) -> Image.Image:
    """The validation pictures up to `step` on one sheet: steps down, prompts across; long runs thinned evenly."""
    cells = list_validation_pictures(Path(args.output_dir))
    steps = sorted({drawn for drawn, _ in cells if drawn <= step})
    rows = sorted({steps[round(row * (len(steps) - 1) / (SHEET_ROWS - 1))] for row in range(SHEET_ROWS)})
    prompts, font, label, header = args.validation_prompt, ImageFont.load_default(16), 64, 48
    columns = len(prompts) * args.num_validation_images
    sheet = Image.new("RGB", (label + columns * SHEET_CELL, header + len(rows) * SHEET_CELL), "white")
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        title = textwrap.fill(prompts[column // args.num_validation_images], 30, max_lines=2, placeholder=" …")
        draw.text((label + column * SHEET_CELL + 4, 4), title, "black", font)
    for row, drawn in enumerate(rows):
        draw.text((label - 8, header + (row + 0.5) * SHEET_CELL), str(drawn), "black", font, anchor="rm")
        for column in range(columns):
            if (drawn, column) in cells:
                with Image.open(cells[drawn, column]) as picture:
                    cell = ImageOps.contain(picture, (SHEET_CELL - 4, SHEET_CELL - 4))
                sheet.paste(cell, (label + column * SHEET_CELL + 2, header + row * SHEET_CELL + 2))
    return sheet


# =================================== 10. Randomness, and the order of the examples ====================================


def generator_for(*key: str | int) -> torch.Generator:
    """A CPU generator seeded by hashing `key`: (seed, purpose, epoch or step, position).

    Everything random comes from here, so that no draw depends on another one, on the number of processes or on
    where a run was stopped.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_normal(shape: torch.Size, seed: int, purpose: str, draws: list[tuple]) -> Tensor:
    """Standard normal noise of `shape` for each of B draws: (B, *shape)."""
    return torch.stack([torch.randn(shape, generator=generator_for(seed, purpose, *draw)) for draw in draws])


class ExampleKey(NamedTuple):
    """Which example is trained, and where in the run: all that its random draws depend on, with the seed."""

    epoch: int
    position: int  # in the order of the epoch, over all processes
    example: int  # its number in the dataset
    loss_weight: float  # share of its loss in the step's: 1 / examples of the step, or 0 for a filler
    last: bool  # whether its micro-batch ends an optimizer step


@dataclass
class MicroBatches:
    """The micro-batches of one process from `first_step` to `last_step`, as lists of example keys.

    An epoch is a shuffle of all examples, cut into micro-batches. Each optimizer step takes the next processes x
    accumulation of them, the last one of an epoch what is left; a process that gets nothing then runs a filler of
    weight zero. With one bucket, which examples make up a step does not depend on how they are split.
    """

    examples: int
    batch_size: int
    accumulation: int
    process: int
    processes: int
    seed: int
    first_step: int
    last_step: int
    buckets: list[Size] | None = None  # the size of each example; None: all the same

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.cut_epoch(0)) / (self.accumulation * self.processes))

    def cut_epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        """All micro-batches of an epoch, of one bucket each, as position and example; the small ones come last."""
        order = torch.randperm(self.examples, generator=generator_for(self.seed, "order", epoch)).tolist()
        full, growing = [], dict[Size | None, list[int]]()
        for example in order:
            bucket = self.buckets[example] if self.buckets else None
            growing.setdefault(bucket, []).append(example)
            if len(growing[bucket]) == self.batch_size:
                full.append(growing.pop(bucket))
        position = itertools.count()
        return [[(next(position), example) for example in batch] for batch in [*full, *growing.values()]]

    def __iter__(self) -> Iterator[list[ExampleKey]]:
        for step in range(self.first_step, self.last_step):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if step == self.first_step or step_in_epoch == 0:
                cut = self.cut_epoch(epoch)
            start = step_in_epoch * self.accumulation * self.processes
            batches = cut[start : start + self.accumulation * self.processes]
            loss_weight = 1 / sum(map(len, batches))
            for first in range(0, len(batches), self.processes):
                last, own = first + self.processes >= len(batches), first + self.process
                if own < len(batches):
                    yield [ExampleKey(epoch, *example, loss_weight, last) for example in batches[own]]
                else:
                    yield [ExampleKey(epoch, *batches[first][0], 0.0, last)]


def make_schedule(
    args: Namespace, accelerator: Accelerator, dataset: DreamBoothDataset, state: RunState
) -> MicroBatches:
    """What this process trains in which step, from where the run stands."""
    split = (accelerator.process_index, accelerator.num_processes)
    sizes = (len(dataset), args.train_batch_size, args.gradient_accumulation_steps)
    return MicroBatches(*sizes, *split, state.seed, state.step, args.max_train_steps, dataset.buckets)


def resolve_steps(args: Namespace, accelerator: Accelerator, dataset: DreamBoothDataset, state: RunState) -> None:
    """Fill in what follows from the data and the processes: `--max_train_steps`, and `--scale_lr`'s rate."""
    per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    steps_per_epoch = make_schedule(args, accelerator, dataset, state).steps_per_epoch
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
    if state.step > args.max_train_steps:
        raise UsageError(
            f"--resume_from_checkpoint={args.resume_from_checkpoint} is at step {state.step}, past the end of this run "
            f"at {args.max_train_steps}: raise --max_train_steps, or name an earlier checkpoint"
        )
    if not args.lr_scheduler.endswith("constant") and args.lr_warmup_steps >= args.max_train_steps:
        short = f"--lr_warmup_steps={args.lr_warmup_steps} is not below the {args.max_train_steps} steps"
        logger.warning(f"{short}: the learning rate only rises")
    if args.scale_lr:
        args.learning_rate *= per_step
        logger.info(f"--scale_lr: the learning rate is {args.learning_rate} for {per_step} examples a step")
    logger.info(
        f"{len(dataset)} examples, {per_step} a step, {steps_per_epoch} steps an epoch, {args.max_train_steps} in all"
    )


# ======================== 11. Memory: loading, quantized and swapped weights, compiled blocks =========================


def hub_options(args: Namespace, **extra: Any) -> dict[str, Any]:
    """The keyword arguments of everything that is loaded of the base model."""
    options = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir, "token": args.hub_token}
    return {name: value for name, value in options.items() if value} | extra


def from_base(kind: Any, args: Namespace, **options: Any) -> Any:
    """`kind.from_pretrained` of the base model, with `options` beside the Hub's; a UsageError if it does not load."""
    name = args.pretrained_model_name_or_path
    try:
        return kind.from_pretrained(name, **hub_options(args, **options))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # each loader has its own kinds
        if not Path(name).exists():  # a Hub that is silent must not end a run whose files are all in the cache
            with contextlib.suppress(Exception):
                return kind.from_pretrained(name, **hub_options(args, **options, local_files_only=True))
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UsageError(
            f"{options.get('subfolder', 'the pipeline')} of --pretrained_model_name_or_path={name} does not load: "
            f"{reason}. Check that the checkpoint is whole, --revision and --variant, and that what "
            "requirements_flux.txt names is installed"
        ) from error


def load_scheduler(args: Namespace) -> FlowMatchEulerDiscreteScheduler:
    """The sampler that comes with the model; fresh, its `sigmas` are the table that training draws from."""
    return from_base(FlowMatchEulerDiscreteScheduler, args, subfolder="scheduler")


def load_base(args: Namespace, dtype: torch.dtype, device: torch.device) -> FluxTransformer2DModel:
    """The frozen transformer in `dtype`, read tensor by tensor straight to `device`."""
    return from_base(
        FluxTransformer2DModel, args, subfolder="transformer", dtype=dtype, device_map={"": device}
    ).requires_grad_(False)


def read_transformer(args: Namespace, accelerator: Accelerator, dtype: torch.dtype) -> FluxTransformer2DModel:
    """The transformer, frozen in `dtype`: on the device, or on the CPU for an engine that shards it.

    Only process 0 reads the file where the engine gives its weights to all, as DDP, FSDP2 and ZeRO do: the others
    reserve memory, which stays untouched on the CPU.
    """
    device = torch.device("cpu") if is_sharded(accelerator) else accelerator.device
    from_main = not args.fused_backward_pass  # which replaces DDP
    if accelerator.is_main_process or not from_main:
        return load_base(args, dtype, device)
    return empty_transformer(args).to(dtype).to_empty(device=device).requires_grad_(False)


def empty_transformer(args: Namespace) -> FluxTransformer2DModel:
    """The transformer without weights, on the meta device: only its config is read."""
    options = hub_options(args, subfolder="transformer")
    config = FluxTransformer2DModel.load_config(args.pretrained_model_name_or_path, **options)
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(config)


def list_blocks(transformer: Any) -> list[nn.Module]:
    """The blocks of an unwrapped transformer, in the order in which they run."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def choose_blocks(transformer: nn.Module, flag: str, count: int) -> list[nn.Module]:
    """So many blocks, evenly spread; a UsageError if there are fewer than `count`, the value of `flag`."""
    blocks = list_blocks(transformer)
    if count > len(blocks):
        raise UsageError(f"{flag} is {count}; this transformer has {len(blocks)} blocks")
    return [blocks[number * len(blocks) // count] for number in range(count)]


def run_block(recomputed: list[nn.Module], block: nn.Module, *inputs: Any) -> Any:
    """What diffusers calls for each block under gradient checkpointing; those not `recomputed` keep what they made."""
    return checkpoint(block, *inputs, use_reentrant=False) if block in recomputed else block(*inputs)


def normalize(module: Any, x: Tensor) -> Tensor:
    """A LayerNorm or RMSNorm in the precision of its input: CUDA's autocast would write float32, and read it again.

    The kernels sum in float32 whatever they are given. Flash attention takes queries and keys in half precision only.
    """
    weight = None if module.weight is None else module.weight.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(module, nn.RMSNorm):
            return nn.functional.rms_norm(x, module.normalized_shape, weight, module.eps)
        bias = None if module.bias is None else module.bias.to(x.dtype)
        return nn.functional.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


NORMS = {  # as classes: a forward of its own in each module would be compiled for each
    kind: type(kind.__name__, (kind,), {"forward": normalize}) for kind in (nn.LayerNorm, nn.RMSNorm)
}


def add_rotations(module: nn.Module, inputs: Any, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Hook of the positions: beside cosines and sines (S, D), where each stands twice, complex numbers (S, 1, D/2)."""
    if pair[0].device.type not in ("cpu", "cuda"):  # others may not multiply complex numbers
        return pair
    return (*pair, torch.complex(*(part[:, ::2].contiguous() for part in pair))[:, None])


def rotate(x: Tensor, frequencies: tuple[Tensor, ...], sequence_dim: int) -> Tensor:
    """Rotary embedding of queries or keys (B, S, H, D) in float32; diffusers' takes three times as many kernels.

    Compiled, diffusers' is one, and complex numbers are not compiled.
    """
    if len(frequencies) == 2 or torch.compiler.is_compiling():
        return apply_rotary_emb(x, frequencies[:2], sequence_dim=sequence_dim)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * frequencies[2]).flatten(-2).to(x.dtype)


def set_up_blocks(args: Namespace, transformer: FluxTransformer2DModel) -> None:
    transformer.pos_embed.register_forward_hook(add_rotations)
    transformer_flux.apply_rotary_emb = rotate
    if args.gradient_checkpointing:
        count, flag = args.gradient_checkpointing_blocks, "--gradient_checkpointing_blocks"
        recomputed = list_blocks(transformer) if count is None else choose_blocks(transformer, flag, count)
        transformer.enable_gradient_checkpointing(functools.partial(run_block, recomputed))
    backend = "_native_npu" if args.enable_npu_flash_attention else args.attention_backend
    if backend:
        transformer.set_attention_backend(backend)
    # cuDNN's backward pass, torch's first choice on an H100, gave NaN gradients at once (torch 2.11, cuDNN 9.19).
    torch.backends.cuda.enable_cudnn_sdp(False)  # `_native_cudnn` switches it on where it is asked for
    for module in transformer.modules():
        if type(module) in NORMS:
            module.__class__ = NORMS[type(module)]


def compile_blocks(accelerator: Accelerator, transformer: nn.Module) -> None:
    """Compile each block by accelerate's dynamo settings; one graph serves all blocks of a kind.

    The forward functions are compiled, not the modules: names of weights stay, and hooks run outside. Where compiling
    fails, all blocks go on uncompiled.
    """
    plugin, blocks = accelerator.state.dynamo_plugin, list_blocks(transformer)
    if plugin.backend == DynamoBackend.NO or plugin.disable:
        return
    took = "the first step of each size takes longer, FLUX.1 [dev]'s about 20 s"  # measured with inductor on an H100
    logger.info(f"Compiling the blocks with {plugin.backend.value.lower()}: {took}")
    torch._dynamo.config.recompile_limit = 64  # a graph for each shape, for training, sampling and the base as prior
    torch._functorch.config.force_non_lazy_backward_lowering = True  # where the backward fails, the forward says so

    def alike(value: Any, trains: bool) -> Any:  # tokens (B, L, D): the first need no gradient, later ones have gaps
        if not (isinstance(value, Tensor) and value.ndim == 3):
            return value
        return value.flatten().view_as(value).requires_grad_(value.requires_grad or trains)

    def run_compiled(block: nn.Module, compiled: Callable, trains: bool, *args: Any, **kwargs: Any) -> Any:
        trains = trains and torch.is_grad_enabled()
        args = tuple(alike(value, trains) for value in args)
        kwargs = {name: alike(value, trains) for name, value in kwargs.items()}
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            logger.warning(f"Compiling failed, so the blocks run uncompiled: {' '.join(str(error).splitlines()[:2])}")
            for other in blocks:
                vars(other).pop("forward", None)
            return block.forward(*args, **kwargs)

    options, plain = plugin.to_kwargs(), {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
    if plugin.mode in plain:  # with CUDA graphs the next block would overwrite what this one gave
        options["mode"] = plain[plugin.mode]
    trains = False  # this block or one before it
    for block in blocks:
        trains = trains or any(weight.requires_grad for weight in block.parameters())
        compiled = torch.compile(block.forward, **options)
        block.forward = functools.partial(run_compiled, block, compiled, trains)  # type: ignore[method-assign]
    plugin.backend = DynamoBackend.NO  # `prepare` would compile the whole


def round_stochastically_(target: Tensor, source: Tensor, generator: torch.Generator) -> None:
    """Write float32 `source` into bfloat16 `target`, up or down at random so that the mean is `source`.

    Random bits are added to the 16 that bfloat16 drops, which carries into the kept ones just as often as they are near
    (https://arxiv.org/abs/2010.06192, section 3.2).
    """
    noise = torch.randint(0, 2**16, source.shape, dtype=torch.int32, device=source.device, generator=generator)
    target.copy_(noise.add_(source.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32))


class PerParameterOptimizer(torch.optim.Optimizer):
    """Runs an optimizer of its own for each parameter.

    A bfloat16 parameter is updated as a float32 copy that lives for its update alone, and rounded stochastically: a
    plain bf16 update at a learning rate of 1e-5 would be lost for most weights. After `fuse`, each parameter is updated
    in the backward pass as soon as its gradient is complete, and the gradient freed.

    Args:
        groups: as of any optimizer.
        make: the optimizer of a list with one group, whose one parameter is float32.
        settings: names of its settings, which stay when a state is loaded.
        seed: of the rounding, which draws from generators of its own.
    """

    def __init__(
        self,
        groups: list[dict],
        make: Callable[[list[dict]], torch.optim.Optimizer],
        settings: Iterable[str],
        seed: int,
    ) -> None:
        super().__init__(groups, {"lr": groups[0]["lr"]})
        self.seed, self.settings, self.steps = seed, list(settings), 0
        self.max_grad_norm, self.squared_norm = math.inf, torch.zeros(())
        self.processes = accelerate.PartialState().num_processes
        self.optimizers = []  # of one parameter each: the parameter, its group, and its optimizer
        for group in self.param_groups:
            for parameter in group["params"]:
                held = parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.new_empty(0).float())
                self.optimizers.append((parameter, group, make([group | {"params": [held]}])))

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Update parameter `number` by its gradient, if it has one, and free that."""
        parameter, group, optimizer = self.optimizers[number]
        if parameter.grad is None:
            return
        held = optimizer.param_groups[0]["params"][0]
        optimizer.param_groups[0]["lr"] = group["lr"]
        if held is parameter:
            optimizer.step()
        else:
            held.data, held.grad = parameter.float(), parameter.grad.float()
            optimizer.step()
            seed = generator_for(self.seed, "rounding", self.steps, number).initial_seed()
            round_stochastically_(parameter, held, torch.Generator(parameter.device).manual_seed(seed))
            held.data, held.grad = parameter.new_empty(0).float(), None
        parameter.grad = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient left; after a fused backward pass only the count goes on."""
        for number in range(len(self.optimizers)):
            self.update(number)
        self.steps += 1

    def fuse(self, max_grad_norm: float) -> None:
        """Update in the backward pass from now on, each gradient averaged over processes and clipped by itself."""
        self.max_grad_norm = max_grad_norm
        update = functools.partial(PerParameterOptimizer.update_in_backward, weakref.proxy(self))
        for number, (parameter, _, _) in enumerate(self.optimizers):  # a hook that held the optimizer would never go
            parameter.register_post_accumulate_grad_hook(functools.partial(update, number))

    def update_in_backward(self, number: int, parameter: Tensor) -> None:
        if self.processes > 1:
            parameter.grad = accelerate.utils.reduce(parameter.grad, "mean")
        gradient: Any = parameter.grad
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self.squared_norm = self.squared_norm.to(norm.device) + norm.square()
        if self.max_grad_norm < math.inf:  # as `clip_grad_norm_` does, in a quarter of its kernels
            gradient.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        self.update(number)

    def take_norm(self) -> Tensor:
        """The norm of the gradient of the last backward pass, before clipping."""
        norm, self.squared_norm = self.squared_norm.sqrt(), torch.zeros_like(self.squared_norm)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Each optimizer's state, in its own dtypes."""
        lrs = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        states = [optimizer.state_dict() for _, _, optimizer in self.optimizers]
        return {"steps": self.steps, "param_groups": lrs, "state": dict(enumerate(states))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
        for number, (_, _, optimizer) in enumerate(self.optimizers):
            with keep_settings(optimizer, self.settings):
                optimizer.load_state_dict(state_dict["state"][number])


# ============================== 12. What a run holds and prepares, engines and processes ==============================


@dataclass
class RunState:
    """Progress of the run. With the weights and the optimizer's state, all that an exact resume needs."""

    step: int  # optimizer steps done
    seed: int
    untrained_loss: float | None = None  # the validation loss before the first step, of the same pictures
    owes_validation: bool = False  # whether a validation is due after this step
    seconds: float = 0.0  # that the steps took


@dataclass
class TrainingData:
    """Everything prepared before the transformer loads."""

    dataset: DreamBoothDataset
    prompts: dict[str, PromptEmbeds]
    vae: Any  # AutoencoderKL, or None when nothing needs it any more
    vae_config: Any  # its numbers outlive it
    validation: list[tuple[str, Tensor, Tensor | None]]  # prompt, latents, token weights for the validation loss
    metadata: dict[str, Any]  # what a checkpoint remembers of the data and the processes
    scheduler_config: Any = None  # the constants of --flow_shift=dynamic


@dataclass
class Trained:
    """What is trained, and what trains it; wrapped by accelerate."""

    transformer: nn.Module
    text_encoder: nn.Module | None
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    ema: EMAModel | None = None  # with `--use_ema`

    @property
    def models(self) -> list[nn.Module]:
        return [model for model in (self.transformer, self.text_encoder) if model is not None]

    @functools.cached_property
    def parameters(self) -> list[nn.Parameter]:
        parameters = (parameter for model in self.models for parameter in model.parameters())
        return [parameter for parameter in parameters if parameter.requires_grad]

    @property
    def size(self) -> int:
        """How many numbers are trained; ZeRO-3 leaves empty parameters where it shards."""
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.parameters)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, what is trained has the average of its weights, if there is one; after, exactly what it had."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)


@dataclass
class Run:
    """A training run: its flags and processes, what was prepared, what is trained, and its progress."""

    args: Namespace
    accelerator: Accelerator
    data: TrainingData
    trained: Trained
    state: RunState
    signals: StopSignals

    def asked_to_stop(self) -> bool:
        """Whether a process has got a signal to stop; called on all."""
        return any(gather_object([self.signals.pending()]))


def prepare_data(
    args: Namespace, accelerator: Accelerator, dataset: DreamBoothDataset, pictures: Pictures
) -> TrainingData:
    """Encode prompts, and pictures if they are to be cached, and free what encoded them."""
    held_out = pictures.get("validation", pictures["instance"]) if args.validation_loss else []
    prompts = [*dataset.prompts, *(picture.prompt for picture in held_out), *(args.validation_prompt or [])]
    prompts = list(dict.fromkeys(prompts))
    with stage(args, accelerator, f"Encoding {len(prompts)} prompts"):
        encoded = encode_prompts(args, accelerator, prompts, weight_dtype(accelerator))
    with stage(args, accelerator, "Encoding the pictures" if args.cache_latents else "Loading the VAE"):
        vae = load_vae(args, accelerator)
        vae_config = vae.config
        validation = encode_validation_pictures(args, accelerator, vae, held_out)
        if args.cache_latents:
            cache_latents(accelerator, vae, dataset)
            read_resized.cache_clear()  # from here on nothing reads pictures
            vae = vae.to("cpu") if args.validation_prompt else None
    metadata = {
        "processes": accelerator.num_processes,
        "engine": engine_name(accelerator),
        "precision": accelerator.mixed_precision,
        "training pictures": fingerprint(dataset.sources),
        "validation pictures": fingerprint({str(training_sizes(args)): held_out}),
    }
    return TrainingData(dataset, encoded, vae, vae_config, validation, metadata, load_scheduler(args).config)


@torch.no_grad()
def embed_prompt(accelerator: Accelerator, text_encoder: nn.Module | None, embeds: PromptEmbeds) -> PromptEmbeds:
    """The prompt as a CLIP that is trained sees it now; unchanged if there is none."""
    if text_encoder is None:
        return embeds
    was_training = text_encoder.training
    pooled = text_encoder.eval()(embeds.clip_ids[None].to(accelerator.device)).pooler_output
    text_encoder.train(was_training)
    return embeds._replace(pooled_prompt_embeds=pooled[0].cpu())


def cache_latents(accelerator: Accelerator, vae: AutoencoderKL, dataset: DreamBoothDataset) -> None:
    """Encode every picture of the dataset once, the processes sharing the work.

    What is kept is the posterior, so that each step still draws a sample of its own. Repeats of a picture get crops
    and flips of their own; where they come out the same, they are encoded once.
    """
    views = range(dataset.args.cached_views)
    needed = [(source, index % len(part), size, view) for source, part in dataset.sources.items()
              for index, size in enumerate(dataset.buckets) for view in views]  # fmt: skip
    mine = list(dict.fromkeys(needed))[accelerator.process_index :: accelerator.num_processes]
    cached, encoded = dict[tuple[str, int, Size, int], dict[str, Any]](), dict[Any, LatentDistribution]()
    bar = tqdm(mine, desc="Encoding pictures", leave=False, delay=2, disable=not accelerator.is_main_process or None)
    for source, index, size, view in bar:
        loaded = dataset.load(source, index, size, 0, index, *([view] if view else []))
        pixels, picture = loaded.pop("pixels"), (source, dataset.sources[source][index].name, loaded["crop"])
        if picture not in encoded:
            encoded[picture] = LatentDistribution(*(part[0].cpu() for part in encode_pixels(vae, pixels[None])))
        cached[source, index, size, view] = loaded | {"latents": encoded[picture]}
    dataset.cached = gather_dicts(cached)


@torch.no_grad()
def encode_validation_pictures(
    args: Namespace, accelerator: Accelerator, vae: AutoencoderKL, pictures: list[Picture]
) -> list[tuple[str, Tensor, Tensor | None]]:
    """Prompt, latents (1, C, H, W) and weights of the tokens: centre crop, mean of the posterior, nothing random."""
    encoded, sizes = {}, training_sizes(args)
    for number in range(accelerator.process_index, len(pictures), accelerator.num_processes):
        picture = pictures[number]
        loaded = load_picture(picture, nearest_size(picture.size, sizes), args)
        mean = encode_pixels(vae, loaded["pixels"][None]).mean.cpu()
        latents = (mean - vae.config.shift_factor) * vae.config.scaling_factor
        encoded[number] = (picture.prompt, latents, loaded.get("token_weights"))
    return [encoded for _, encoded in sorted(gather_dicts(encoded).items())]


def fingerprint(pictures: Pictures) -> str:
    """How many pictures there are, and the CRC-32 of what is known of them."""
    known = {source: [(one.name, one.prompt, one.digest) for one in part] for source, part in pictures.items()}
    return f"{sum(map(len, pictures.values()))} ({zlib.crc32(json.dumps(known).encode()):08x})"


def start_state(args: Namespace, resumed: Checkpoint | None) -> RunState:
    """Where the run starts: at the checkpoint, or at step 0 with `--seed` or a seed that is drawn."""
    if resumed is not None:
        known = {field.name for field in fields(RunState)}
        state = RunState(**{name: value for name, value in resumed.metadata["state"].items() if name in known})
        if args.seed not in (None, state.seed):
            logger.warning(f"--seed={args.seed} has no effect: the run goes on with the checkpoint's {state.seed}")
        return state
    if args.seed is not None:
        return RunState(0, args.seed)
    seed = broadcast_object_list([random.SystemRandom().randrange(2**31)])[0]
    logger.info(f"No --seed: drew {seed}")
    return RunState(0, seed)


def start_trackers(args: Namespace, accelerator: Accelerator) -> None:
    config = {name: "" if value is None else value for name, value in settings(args).items()}
    config = {name: json.dumps(value) if isinstance(value, list) else value for name, value in config.items()}
    if args.hub_token:  # wandb and others upload the command line
        sys.argv = [word.replace(args.hub_token, "***") for word in sys.argv]
    try:
        accelerator.init_trackers(PROJECT, config=config)
    except Exception as error:  # each tracker has its own kinds
        raise UsageError(
            f"--report_to={args.report_to} does not start: {error}. For wandb: `wandb login`, or WANDB_MODE=offline; "
            "or give --report_to=tensorboard or none"
        ) from error


def make_accelerator(args: Namespace) -> Accelerator:
    """Devices, processes, precision and trackers, and how this script logs."""
    project = ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir) / args.logging_dir))
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=project,
            step_scheduler_with_optimizer=False,  # the schedule counts optimizer steps, not processes
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),  # others wait for process 0's downloads
                DistributedDataParallelKwargs(broadcast_buffers=False),  # int8's scales, which are the same everywhere
                AutocastKwargs(cache_enabled=False),  # casts that nothing reads again: 22 GiB in full fine-tuning
            ],
        )
    except (ValueError, ImportError) as error:
        raise UsageError(f"--mixed_precision={args.mixed_precision}, --report_to={args.report_to}: {error}") from error
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()  # the stages are announced
    for name, level in (("lora_pipeline", logging.WARNING), ("lora_conversion_utils", logging.INFO)):
        logging.getLogger(f"diffusers.loaders.{name}").setLevel(level)  # what they leave out of a LoRA
        logging.getLogger(f"diffusers.loaders.{name}").addFilter(lambda record: "is sparse" not in str(record.msg))
    if args.report_to != "none" and not accelerator.log_with:
        raise UsageError(f"--report_to is {args.report_to!r}, which is not installed; install it, or give none")
    precision = accelerator.mixed_precision
    if precision not in ("no", "bf16", "fp16"):
        raise UsageError(
            f"--mixed_precision is not given, and accelerate's configuration says {precision}, which cannot work here; "
            "give --mixed_precision=bf16 or no"
        )
    if precision == "fp16" and accelerator.device.type == "cpu":  # where accelerate would leave out both
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    half_only = re.search("flash|cudnn|aiter", args.attention_backend or "")
    if half_only and precision == "no" and accelerator.device.type != "cpu":
        raise UsageError(f"--attention_backend={args.attention_backend} needs --mixed_precision=bf16 or fp16")
    for note in notes_on_args(args):
        logger.warning(note)
    set_up_engine(args, accelerator)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32  # accelerate switches it on where blocks are compiled
    return accelerator


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision of what is frozen, by what accelerate resolved from flag, environment and configuration."""
    return PRECISIONS[accelerator.mixed_precision]


def engine_name(accelerator: Accelerator) -> str:
    """In which form a checkpoint holds the optimizer's state: a run on one process and DDP's have the same."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return "FSDP2" if accelerator.distributed_type == DistributedType.FSDP else "DDP"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the processes hold parts of what is trained (FSDP2, ZeRO), so that all must run each forward together."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def set_up_engine(args: Namespace, accelerator: Accelerator) -> None:
    """Set in FSDP2 or DeepSpeed what accelerate's configuration cannot know."""
    if is_sharded(accelerator):
        asked = [flag.name for flag in FLAG_OF.values() if not flag.sharded and flag.is_on(args)]
        if accelerator.distributed_type not in chosen_optimizer(args).engines:  # its update needs whole tensors
            asked.append("--use_8bit_adam" if args.use_8bit_adam else f"--optimizer={args.optimizer}")
        if asked:
            raise UsageError(
                f"{', '.join(asked)}: not with {engine_name(accelerator)}, which shards one model and steps with plain "
                "AdamW; leave it out, or use accelerate_configs/ddp.yaml"
            )
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if not accelerator.is_fsdp2:
            raise UsageError("accelerate's configuration asks for FSDP1; set fsdp_version: 2 in fsdp_config")
        if plugin.activation_checkpointing:  # it changes the names of the weights
            raise UsageError(
                "accelerate's configuration asks for fsdp_activation_checkpointing; set it to false in fsdp_config, "
                "and give --gradient_checkpointing"
            )
        disable_fsdp_ram_efficient_loading()  # in transformers: each process encodes with text encoders of its own
        plugin.cpu_ram_efficient_loading = True
        if plugin.mixed_precision_policy is not None:
            # Gradients are summed in float32; autocast, not FSDP, casts inputs.
            changes = {"reduce_dtype": torch.float32, "output_dtype": None, "cast_forward_inputs": False}
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **changes)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        plugin.zero3_init_flag, plugin.dschf = False, None  # nor are the text encoders sharded
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": args.train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "gradient_clipping": args.max_grad_norm,
        }


def prepare_training(
    args: Namespace, accelerator: Accelerator, data: TrainingData, resumed: Checkpoint | None, seed: int
) -> Trained:
    """Load what is trained, make its optimizer and schedule, and hand all of it to accelerate.

    Of a checkpoint whose optimizer state does not fit, the weights are taken here; all else by `load_checkpoint`.
    """
    transformer = load_transformer(args, accelerator)
    text_encoder = load_text_encoder(args).to(accelerator.device) if args.train_text_encoder else None
    if args.init_lora and resumed is None and (accelerator.is_main_process or not is_sharded(accelerator)):
        start_from_lora(args, [model for model in (transformer, text_encoder) if model is not None])
    if resumed and not optimizer_fits(resumed.metadata["data"], data.metadata) and accelerator.is_main_process:
        for model in filter(None, (transformer, text_encoder)):  # the main process gives them to the others
            load_weights(model, resumed.folder)
    if is_sharded(accelerator) and accelerator.mixed_precision != "no":  # accelerate does so for the others
        autocast = torch.autocast(accelerator.device.type, weight_dtype(accelerator), cache_enabled=False)
        transformer.forward = autocast(transformer.forward)
    compile_blocks(accelerator, transformer)
    groups = parameter_groups(args, transformer, text_encoder)
    if args.full_bf16 or args.fused_backward_pass:
        settings_kept, make = chosen_optimizer(args).settings(args, "cpu"), functools.partial(make_optimizer, args)
        optimizer: torch.optim.Optimizer = PerParameterOptimizer(groups, make, settings_kept, seed)
    else:
        optimizer = make_optimizer(args, groups)
    steps = max(args.max_train_steps, args.lr_warmup_steps + 1)  # diffusers divides by those after the warm-up
    shape = (args.lr_step_rules, args.lr_warmup_steps, steps, args.lr_num_cycles, args.lr_power)
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, *shape)
    if args.fused_backward_pass:  # its optimizer averages over processes itself, in place of DDP
        optimizer.fuse(args.max_grad_norm or math.inf)  # type: ignore[attr-defined]
        for model in filter(None, (transformer, text_encoder)):
            accelerator.prepare_model(model, evaluation_mode=True)  # keeps it for checkpoints
        optimizer, lr_scheduler = accelerator.prepare(optimizer, lr_scheduler)
    else:
        transformer, optimizer, lr_scheduler = accelerator.prepare(transformer, optimizer, lr_scheduler)
        text_encoder = None if text_encoder is None else accelerator.prepare(text_encoder)
    register_state_hooks(accelerator)
    trained = Trained(transformer, text_encoder, optimizer, lr_scheduler)
    if args.use_ema:
        trained.ema = EMAModel([], args.ema_decay)  # it would copy the float32 copies of bf16 weights once more
        trained.ema.shadow_params = [weight.detach().to(torch.float32, copy=True) for weight in trained.parameters]
        accelerator.register_for_checkpointing(trained.ema)
    kinds = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained.parameters}))
    logger.info(f"Training {trained.size:,} parameters in {kinds} under mixed precision {accelerator.mixed_precision}")
    return trained


def unwrap(model: nn.Module) -> Any:
    """The model under what accelerate put around it for processes and compiling.

    accelerate's own `unwrap_model` imports DeepSpeed wherever it is installed, which takes a second.
    """
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        model = inner
    return model


def component_name(model: nn.Module) -> str:
    """What a pipeline calls an unwrapped model: "transformer" or "text_encoder"."""
    return "transformer" if isinstance(model, FluxTransformer2DModel) else "text_encoder"


def gather_dicts(mine: dict[Any, Any]) -> dict[Any, Any]:
    """The union of the dictionaries of all processes, on all of them."""
    return {key: value for part in gather_object([mine]) for key, value in part.items()}


def own_share(accelerator: Accelerator, count: int) -> range:
    """This process's part of `count` forwards; as many on all processes, numbers from `count` on are fillers."""
    processes = accelerator.num_processes
    return range(accelerator.process_index, math.ceil(count / processes) * processes, processes)


def backward(run: Run, loss: Tensor) -> None:
    """The backward pass of a micro-batch; accelerate's divisions are undone, as `loss_weights` make the mean."""
    if run.args.fused_backward_pass:
        check_finite(run, run.accelerator.reduce(loss.detach(), reduction="sum").item(), None)
    run.accelerator.backward(loss * run.accelerator.gradient_accumulation_steps * run.accelerator.num_processes)


def clip_gradients(run: Run) -> Tensor | None:
    """Clip the norm of all gradients to `--max_grad_norm`, unless the backward pass clipped; returns what it was."""
    if run.args.fused_backward_pass:
        return run.trained.optimizer.optimizer.take_norm()  # type: ignore[attr-defined]
    return run.accelerator.clip_grad_norm_(run.trained.parameters, run.args.max_grad_norm or math.inf)


def check_finite(run: Run, loss: float, grad_norm: Tensor | None) -> None:
    """Stop unless a loss and the norm of its gradient, where it is known, are numbers."""
    # In fp16, a step whose gradient is not finite is skipped, and the loss's scale halved, from 2^16 on.
    skips, scaler = run.accelerator.mixed_precision == "fp16", run.accelerator.scaler
    lost = scaler is not None and scaler.get_scale() < 2**-14  # thirty times more than it grew
    norm = math.nan if lost else 0.0 if grad_norm is None or skips else float(grad_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise RunError(
            f"the loss is {loss} at step {run.state.step}, its gradient's norm {norm}. Likely causes: --learning_rate "
            "too high, an fp16 overflow, or broken weights. Checkpoints written so far are good: go on with "
            "--resume_from_checkpoint=latest and a lower --learning_rate, or --mixed_precision=bf16"
        )


def check_model(args: Namespace) -> FluxTransformer2DModel:
    """Stop unless the base is a FLUX.1 pipeline that fits the flags; its weights are not read."""
    name = args.pretrained_model_name_or_path
    if args.attention_backend:
        try:
            _check_attention_backend_requirements(AttentionBackendName(args.attention_backend))
        except RuntimeError as error:
            raise UsageError(f"--attention_backend is {args.attention_backend}: {error}") from error
    try:
        index = FluxPipeline.load_config(name, **hub_options(args))
        is_flux = index.get("_class_name") == "FluxPipeline" and "transformer" in index
        transformer = empty_transformer(args) if is_flux else None
    except Exception as error:  # the Hub's client has its own kinds
        reason = " ".join(f"{error} {error.__context__ or ''}".split())
        gated = "FLUX.1 [dev] is gated: accept its terms on its page, then `hf auth login`, or give --hub_token"
        hint = "" if Path(name).exists() else f" ({gated})"
        message = f"--pretrained_model_name_or_path is {name!r}, which does not load: {reason}{hint}"
        raise UsageError(message) from error
    if transformer is None:
        raise UsageError(f"--pretrained_model_name_or_path is {name!r}, which is a {index.get('_class_name')}")
    return transformer


def check_parts(args: Namespace, transformer: FluxTransformer2DModel, resumed: Checkpoint | None) -> None:
    """Stop unless the blocks that flags name are there, and the optimizer can be made."""
    flag = "--gradient_checkpointing_blocks"
    choose_blocks(transformer, flag, getattr(args, flag[2:]) or 0)
    make_optimizer(args, parameter_groups(args, transformer, None))  # what is wrong in OPTIMIZERS fails here
    if args.init_lora and resumed is None:
        read_lora(args)


def check_everything(args: Namespace, accelerator: Accelerator) -> tuple[Pictures, Checkpoint | None, str]:
    """Everything that can go wrong before a model is loaded goes wrong here, on the main process first."""
    found: list[Any] = [None, None, None]
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            transformer = check_model(args)
        pictures = list_pictures(args)
        if accelerator.is_main_process:
            unlock_folders()  # of a run before, in the same process
            lock_folder("--output_dir", Path(args.output_dir), LOCK_SECONDS)
            remove_leftovers(Path(args.output_dir))
            resumed = find_checkpoint(args)
            if resumed and (changed := changed_flags(resumed.metadata["args"], args, "refuse")):
                reason = f"{resumed.folder} does not fit this run: {', '.join(changed)}"
                raise UsageError(f"{reason}. Give them as they were, or start anew")
            check_parts(args, transformer, resumed)
            repo_id = create_repository(args) if args.push_to_hub else Path(args.output_dir).resolve().name
            make_folder("--output_dir", args.output_dir)
            if args.with_prior_preservation and len(pictures.get("class", [])) < args.num_class_images:
                make_folder("--class_data_dir", args.class_data_dir)
            found = [repo_id, resumed, pictures.get("class", [])]
    repo_id, resumed, drawn = broadcast_object_list(found)
    if args.with_prior_preservation and len(drawn) < args.num_class_images:  # another run may be drawing them now
        pictures["class"] = drawn
    check_machines(args, accelerator, resumed, pictures)
    return pictures, resumed, repo_id


def make_folder(flag: str, folder: str) -> None:
    """Make a folder that will be written to, the value of `flag`; a UsageError if it cannot be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{flag} is {folder!r}, which cannot be written: {error}") from error


def check_machines(args: Namespace, accelerator: Accelerator, resumed: Checkpoint | None, pictures: Pictures) -> None:
    """Stop unless all machines have what they need: the same pictures, the checkpoint, and folders that all write."""
    folders = {"--output_dir": args.output_dir} if is_sharded(accelerator) else {}
    if args.with_prior_preservation and len(pictures.get("class", [])) < args.num_class_images:
        folders["--class_data_dir"] = args.class_data_dir
    name = broadcast_object_list([f".flux-probe-{random.SystemRandom().random()}"])[0]
    probes = {flag: Path(folder) / name for flag, folder in folders.items()}
    for probe in probes.values() if accelerator.is_main_process else []:
        probe.touch()
    accelerator.wait_for_everyone()
    found = [flag for flag, probe in probes.items() if probe.exists()]
    names = [(kind, one.name, one.prompt, one.digest) for kind, part in pictures.items() for one in part]
    state_file = None if resumed is None else resumed.folder / STATE_FILE
    checkpoint = state_file.read_text() if state_file and state_file.is_file() else None
    pictures_of, checkpoint_of, found_of = zip(*gather_object([(names, checkpoint, found)]), strict=True)
    for probe in probes.values() if accelerator.is_main_process else []:
        probe.unlink(missing_ok=True)
    if any(others != names for others in pictures_of):
        raise UsageError("the machines have different pictures; copy the folders, or put them on a disk that all see")
    if any(others != checkpoint for others in checkpoint_of):
        raise UsageError(
            f"{state_file} is not the same on all machines; copy the folder, or share --output_dir between them"
        )
    for flag, folder in folders.items():
        if not all(flag in flags for flags in found_of):
            message = f"{flag} is {folder!r}, which not all machines share, and all of them write into it"
            raise UsageError(f"{message}: give a folder on a disk that all see")


# ================================================== 13. Checkpoints ===================================================


class Checkpoint(NamedTuple):
    """A checkpoint that was found whole."""

    folder: Path
    metadata: dict[str, Any]  # what its STATE_FILE says: "script", "kind", "state", "args", "data"


STATE_FILE = "training_state.json"  # written last: a checkpoint folder without it is not whole
VALIDATED_FILE = "validated"  # in a checkpoint: the validation that was due after it has been made
FLAGS_FILE = "flags.txt"  # the flags of the last run, to be given as @flags.txt
RESULT_FILE = "training_result.json"  # written last of all: without it a run is not finished
LOCK_SECONDS = 60
HELD: list[FileLock] = []  # the locks of folders that this process writes to
PIECE = 2**28  # bytes that one thread hashes at a time
UMASK = os.umask(0o077)
os.umask(UMASK)  # there is no call that only reads it
PARTIAL, OLD = ".flux-partial", ".flux-old"  # ends of names that are being written, or replaced


def save_checkpoint(run: Run) -> None:
    """Write `checkpoint-<step>`: called on all processes, whole or not there, the oldest pruned after."""
    args, accelerator, state = run.args, run.accelerator, run.state
    output, trained = Path(args.output_dir), run.trained
    states = [leaf for leaf in tree_leaves(trained.optimizer.state_dict()) if isinstance(leaf, Tensor)]
    engine, width = accelerator.distributed_type, 2 if getattr(args, "full_bf16", False) else 4
    width += 4 * ((engine == DistributedType.FSDP) + (trained.ema is not None))  # shards beside the whole; the average
    parts = accelerator.num_processes if engine == DistributedType.DEEPSPEED else 1  # of the state, which is this one's
    needed = 2**20 + width * trained.size + parts * sum(state.nbytes for state in states)
    partial = output / f".checkpoint-{state.step}{PARTIAL}"
    with cleanup_on_failure(args, f"checkpoint-{state.step}", partial, needed):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            if shutil.disk_usage(output).free < needed:
                raise OSError("not enough space")
        accelerator.wait_for_everyone()
        # DeepSpeed's name for leaving out the frozen; others ignore it.
        accelerator.save_state(str(partial), exclude_frozen_parameters=True)
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            accelerator.wait_for_everyone()  # two hours at most; the groups of ZeRO and HSDP give up after ten minutes
            return
        hashes = checksums(path for path in sorted(partial.rglob("*")) if path.is_file())
        files = {path.relative_to(partial).as_posix(): value for path, value in hashes.items()}
        metadata = {"script": Path(__file__).name, "state": asdict(state), "args": settings(args)}
        metadata |= {"data": run.data.metadata, "kind": KIND}
        checksum = zlib.crc32(json.dumps([files, metadata]).encode())
        content = {"files": files, "facts": metadata, "checksum": checksum}  # the name that earlier versions read
        (partial / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n")
        replace_path(partial, output / f"checkpoint-{state.step}")
    logger.info(f"Saved checkpoint-{state.step}")
    if args.checkpoints_total_limit:
        found = list_checkpoints(output).items()
        earlier = [path for number, path in found if number < state.step and (path / STATE_FILE).is_file()]
        for path in earlier[: max(0, len(earlier) + 1 - args.checkpoints_total_limit)]:
            with warn_if_unwritable(f"The new name of {path.name}, which is to be removed,"):
                remove(path.rename(path.with_name(f".{path.name}{PARTIAL}")))  # never a half-deleted checkpoint
    accelerator.wait_for_everyone()


def mark_validated(run: Run) -> None:
    """Remember, in the checkpoint of this step too, that its validation need not be made up."""
    run.state.owes_validation = False
    folder = Path(run.args.output_dir) / f"checkpoint-{run.state.step}"
    if run.accelerator.is_main_process and folder.is_dir():
        with warn_if_unwritable("The mark of a validation"):
            (folder / VALIDATED_FILE).touch()


def register_state_hooks(accelerator: Accelerator) -> None:
    """Make `save_state` write models in the formats that pipelines load, and `load_state` read them.

    FSDP2 and DeepSpeed write and read their shards of the models beside it.
    """

    def save_hook(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        for model in models:
            save_weights(accelerator, model, Path(folder), None)
        weights.clear()

    def load_hook(models: list[nn.Module], folder: str) -> None:
        while models:
            load_weights(unwrap(models.pop()), Path(folder))

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


def load_weights(model: Any, folder: Path) -> None:
    """Give an unwrapped model the weights of a checkpoint."""
    name = component_name(model)
    pattern = TRANSFORMER_FILES if name == "transformer" else "model{suffix}.safetensors"
    if not (folder / name).is_dir():
        raise UsageError(f"{folder} has no {name}/: it is from a run without --train_text_encoder")
    load_torch_model(model, folder / name, strict=True, filename_pattern=pattern)


def read_lora(args: Namespace) -> dict[str, Tensor]:
    """What diffusers makes of `--init_lora`; a UsageError if it is not of what is trained."""
    parts = ("transformer", "text_encoder") if args.train_text_encoder else ("transformer",)
    try:
        state = FluxPipeline.lora_state_dict(args.init_lora, cache_dir=args.cache_dir, token=args.hub_token)
        if others := [name for name in state if name.partition(".")[0] not in parts]:
            raise ValueError(f"{shorten(others, 3)} is of nothing that is trained (CLIP needs --train_text_encoder)")
    except Exception as error:  # each loader has its own kinds
        raise UsageError(f"--init_lora is {args.init_lora!r}, which does not load: {error}") from error
    return state


def start_from_lora(args: Namespace, models: list[nn.Module]) -> None:
    """Merge `--init_lora` into the weights, as diffusers and peft do; a UsageError if they cannot take all of it."""
    parts: dict[str, Any] = {component_name(model): model for model in models}
    pipeline = FluxPipeline(None, None, parts.get("text_encoder"), None, None, None, parts["transformer"])
    try:
        pipeline.load_lora_weights(args.init_lora, cache_dir=args.cache_dir, token=args.hub_token)
    except Exception as error:  # each loader has its own kinds
        raise UsageError(f"--init_lora is {args.init_lora!r}, which does not load: {error}") from error
    pipeline.fuse_lora(components=list(parts))
    pipeline.unload_lora_weights()
    for model in models:
        model.requires_grad_(True)  # peft froze them


def load_checkpoint(run: Run, resumed: Checkpoint) -> list[str]:
    """Take the state of a checkpoint as far as it fits; settings stay the flags'. Returns what differs from its run."""
    args, trained, metadata, folder = run.args, run.trained, run.data.metadata, resumed.folder
    before, steps = resumed.metadata["data"], resumed.metadata["args"]["max_train_steps"]
    changes = changed_flags(resumed.metadata["args"], args, "warn")
    if "constant" not in args.lr_scheduler and steps != args.max_train_steps:
        changes.append(f"--max_train_steps was {steps} and is {args.max_train_steps}")
    for name in sorted(before.keys() & metadata.keys() - {"validation pictures"}):
        if before[name] != metadata[name]:
            changes.append(f"{name} was {before[name]!r} and is {metadata[name]!r}")
    fits = optimizer_fits(before, metadata)
    if fits:
        # DeepSpeed's name for leaving out the frozen; the others load by way of the host, as some copy the state.
        options = {"load_module_strict": False} if is_sharded(run.accelerator) else {"map_location": "cpu"}
        scaler = run.accelerator.scaler
        if not (folder / "scaler.pt").is_file():  # of a run that was not in fp16: its scale starts anew
            run.accelerator.scaler = None
            if scaler is not None:  # FSDP2 makes a step to load the optimizer's state
                scaler._lazy_init_scale_growth_tracker(run.accelerator.device)
        with keep_settings(trained.optimizer, chosen_optimizer(args).settings(args, "cpu")):
            run.accelerator.load_state(str(folder), **options)
        run.accelerator.scaler = scaler
    else:
        trained.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.bin"))
    schedule, groups = trained.lr_scheduler.scheduler, trained.optimizer.param_groups
    schedule.base_lrs = [group["initial_lr"] for group in groups]  # the flags', from where the schedule stands
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, lr in zip(groups, schedule._last_lr, strict=True):
        group["lr"] = lr
    measured = before.get("validation pictures", metadata["validation pictures"])
    if not args.validation_loss:
        metadata["validation pictures"] = measured
    elif measured != metadata["validation pictures"]:
        run.state.untrained_loss = None
    if trained.ema is not None:  # which came back on the CPU, with the decay that it had
        trained.ema.to(run.accelerator.device)
        trained.ema.decay = args.ema_decay
    kept = "everything" if fits else "the weights and the schedule, not the optimizer's state"
    logger.info(f"Resuming from {folder} at step {run.state.step} of {args.max_train_steps}, with {kept}")
    if changes:
        difference = f"Differs from the run that wrote {folder.name}: {'; '.join(changes)}"
        logger.warning(f"{difference}; results will not match an uninterrupted run")
    return changes


@contextlib.contextmanager
def keep_settings(optimizer: torch.optim.Optimizer, settings: Iterable[str]) -> Iterator[None]:
    """Inside, an optimizer takes the state of a checkpoint; `settings`, weight decay and rate stay the flags'."""
    names = [*settings, "weight_decay", "initial_lr"]
    own = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
    yield
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        group.update(kept)


def optimizer_fits(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a checkpoint's optimizer state can be loaded: of the same engine; for ZeRO also processes, precision."""
    names = ["engine", *(["processes", "precision"] if now["engine"].startswith("ZeRO") else [])]
    return all(before.get(name, now.get(name)) == now.get(name) for name in names)


@contextlib.contextmanager
def cleanup_on_failure(args: Namespace, what: str, partial: Path, needed: int) -> Iterator[None]:
    """Around what writes `what`, of about `needed` bytes, into `partial`: if that fails, nothing of it is left."""
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # each writer has its own kind of error for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        free, kept = shutil.disk_usage(args.output_dir).free, list_checkpoints(args.output_dir).values()
        there = ", ".join(path.name for path in kept) or "no checkpoint yet"
        raise RunError(
            f"{what} was not written ({error}): it needs about {needed:,} bytes, and {args.output_dir} has {free:,}. "
            f"There is {there}: make room, then go on with --resume_from_checkpoint=latest"
        ) from error


@contextlib.contextmanager
def warn_if_unwritable(what: str) -> Iterator[None]:
    """Around what the training can do without: if it cannot be written, a warning says so and the run goes on."""
    try:
        yield
    except (OSError, ValueError) as error:
        logger.warning(f"{what} could not be written: {error}")


def find_checkpoint(args: Namespace) -> Checkpoint | None:
    """The checkpoint that `--resume_from_checkpoint` names and what it says of itself, or None to start anew."""
    wanted, checkpoints = args.resume_from_checkpoint, list_checkpoints(args.output_dir)
    if not wanted:
        return None
    if wanted != "latest":
        for path in (Path(wanted), Path(args.output_dir) / wanted, Path(args.output_dir) / Path(wanted).name):
            if (path / STATE_FILE).is_file():
                return Checkpoint(path, read_checkpoint(path))
        names = ", ".join(path.name for path in checkpoints.values() if (path / STATE_FILE).is_file()) or "none"
        flag = f"--resume_from_checkpoint is {wanted!r}"
        raise UsageError(f"{flag}, which is no checkpoint; {args.output_dir} has {names}")
    for path in reversed(checkpoints.values()):
        try:
            return Checkpoint(path, read_checkpoint(path))
        except UsageError as error:
            logger.warning(f"Skipping a checkpoint: {error}")
    if checkpoints:
        message = "--resume_from_checkpoint=latest: no checkpoint can be used; leave the flag out to start anew"
        raise UsageError(f"{message}, or give the weights of one by another script as --init_lora")
    logger.info(f"--resume_from_checkpoint=latest: no checkpoint in {args.output_dir}, so this run starts anew")
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, after every file of it was compared with its checksum."""
    try:
        content = json.loads((path / STATE_FILE).read_text())
        files, metadata = content["files"], content["facts"]
        if zlib.crc32(json.dumps([files, metadata]).encode()) != content["checksum"]:
            raise ValueError("does not match its checksum")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not whole, or damaged: {STATE_FILE}: {error}") from error
    there = {path / name: expected for name, expected in files.items() if (path / name).is_file()}
    found = checksums(file for file, expected in there.items() if isinstance(expected, str))
    found |= {file: crc32(file) for file, expected in there.items() if isinstance(expected, int)}  # earlier versions'
    if damaged := [name for name, expected in files.items() if found.get(path / name) != expected]:
        raise UsageError(f"{path} is damaged: {shorten(damaged)}: missing, or not matching the checksum")
    earlier = "LoRA" if "lora" in metadata["script"] else "full fine-tuning"  # versions that did not write the kind
    if metadata.get("kind", earlier) != KIND:
        raise UsageError(f"{path} was written by {metadata['script']}, which trains other weights")
    metadata["state"] |= {"owes_validation": False} if (path / VALIDATED_FILE).exists() else {}
    return metadata


def list_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The checkpoints in `output_dir`, whole or not, by step, in order."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def checksums(paths: Iterable[Path]) -> dict[Path, str]:
    """Of each file the XXH3 of those of its pieces, which threads read side by side: a checkpoint may have 143 GB."""
    pieces = [(path, start) for path in paths for start in range(0, max(1, path.stat().st_size), PIECE)]
    whole: dict[Path, Any] = {path: xxhash.xxh3_64() for path, _ in pieces}
    with ThreadPoolExecutor() as pool:
        for (path, _), digest in zip(pieces, pool.map(hash_piece, *zip(*pieces, strict=True)), strict=True):
            whole[path].update(digest)
    return {path: digest.hexdigest() for path, digest in whole.items()}


def hash_piece(path: Path, start: int) -> bytes:
    """XXH3 of at most PIECE bytes of a file from `start` on."""
    digest, buffer, left = xxhash.xxh3_64(), memoryview(bytearray(2**22)), PIECE
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[:left])):
            digest.update(buffer[:count])
            left -= count
    return digest.digest()


def crc32(path: Path) -> int:
    """The checksum of a file in checkpoints of earlier versions."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            value = zlib.crc32(chunk, value)
    return value


def replace_path(new: Path, final: Path) -> None:
    """Put `new`, flushed, in the place of `final`; what stood there goes only after."""
    for path in [*new.rglob("*"), new]:
        if path.is_file():
            with contextlib.suppress(OSError):  # a disk without modes
                path.chmod(0o666 & ~UMASK)  # safetensors lets nobody else read
        flush(path)
    old = final.with_name(f".{final.name}{OLD}")
    if final.is_dir():
        final.rename(old)
    new.replace(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a text that is whole or not there."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")  # so Python holds other encodings
        replace_path(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names where a system can tell, is on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes what may be written
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # Windows opens no folders, and some disks cannot flush a list of names
            raise


def remove_leftovers(output_dir: Path) -> None:
    """Undo what a killed run left half-done, which its names show."""
    for old in output_dir.glob(f".*{OLD}"):
        final = old.with_name(old.name[1 : -len(OLD)])
        if final.exists():
            remove(old)
        else:  # killed between the two renames of `replace_path`
            old.rename(final)
    for partial in output_dir.glob(f".*{PARTIAL}"):
        logger.info(f"Removing {partial.name}, which a killed run left half-written")
        remove(partial)


def remove(path: Path) -> None:
    """Delete a file, a folder, or a link to one; what another program keeps is left, and tried again by a later run."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def set_aside(args: Namespace, resumed: Checkpoint | None, step: int, changed: bool) -> None:
    """Move what an earlier run left in `--output_dir` and could be taken for this one's into a folder of its own.

    All of it where a run starts anew. Where one goes on at `step` from a checkpoint of the folder: what is later than
    that, what is written on request only, pictures of other prompts; the result as well where the training has
    `changed` since, or where no checkpoint has its weights and this run ends elsewhere.
    """
    output, ended = Path(args.output_dir), -1
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        ended = json.loads((output / RESULT_FILE).read_text())["state"]["step"]  # that the result is of
    (output / RESULT_FILE).unlink(missing_ok=True)
    own = resumed is not None and resumed.folder.resolve().parent == output.resolve()
    step = step if own else 0
    kept = own and not changed and (ended <= step or ended == args.max_train_steps)
    other_pictures = resumed is None or not own or bool(changed_flags(resumed.metadata["args"], args, "pictures"))
    patterns = [*(ON_REQUEST if kept else RESULTS), *([SHEET_FILE] if other_pictures else [])]
    left = [path for pattern in patterns for path in output.glob(pattern)]
    left += [path for number, path in list_checkpoints(output).items() if number > step]
    drawn = list_validation_pictures(output).items()
    left += [path for (number, _), path in drawn if number > (-1 if other_pictures else step)]
    left += output.glob(FLAGS_FILE) if left and not own else []
    if left:
        free = (output / f"earlier-{number}" for number in itertools.count(1))
        folder = next(path for path in free if not path.exists())
        for path in left:
            target = folder / path.relative_to(output)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        logger.warning(f"Moved what an earlier run left to {folder}: {shorten([path.name for path in left])}")


def lock_folder(flag: str, folder: Path, most: float) -> None:
    """Keep other runs out of `folder`, the value of `flag`, while this process lives; wait for one that is ending.

    A folder that is there is locked for other machines as well, where its disk can do that.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    places = [Path(tempfile.gettempdir()) / f"flux-{name}.lock", *([folder / ".flux.lock"] if folder.is_dir() else [])]
    locks = [FileLock(place, fallback_to_soft=False) for place in places]  # else a killed run's mark would stay
    for lock, seconds in itertools.product(locks, (0, most)):
        try:
            if not lock.is_locked:
                lock.acquire(timeout=seconds)
                HELD.append(lock)  # only now: what this process does not hold it must not remove
        except Timeout:
            if seconds:
                raise UsageError(
                    f"{flag} is {str(folder)!r}, which another run is using; wait for it, or give another folder"
                ) from None
            logger.warning(f"Another run is using {folder}; waiting up to {most:g} s")
        except (OSError, NotImplementedError):  # a disk that has no locks
            continue


@atexit.register
def unlock_folders(keep: int = 0) -> None:
    """Let other runs into the folders that this process has locked, but for the first `keep` locks."""
    while len(HELD) > keep:
        with contextlib.suppress(OSError):  # Windows removes the file itself
            Path(HELD[-1].lock_file).unlink()
        HELD.pop().release()


def finished_state(args: Namespace, dataset: DreamBoothDataset) -> RunState | None:
    """The end of the run that `latest` would go on with, if it is done, and no picture or flag that matters changed.

    A checkpoint cannot tell: the last one may be long before the end.
    """
    try:
        before = json.loads((Path(args.output_dir) / RESULT_FILE).read_text())
    except (OSError, ValueError):  # a result without its mark may be of another run
        return None
    changed = changed_flags(before, args, "result", "pictures", "warn", "refuse")
    pictures = fingerprint(dataset.sources)
    same = not changed and before.get("training pictures", pictures) == pictures
    same = same and (Path(args.output_dir) / RESULTS[1]).exists()  # of the pictures some may have been sorted out
    earlier = {"step": args.max_train_steps, "seed": before.get("seed")}  # of versions that did not write the state
    return RunState(**before.get("state", earlier)) if same and args.resume_from_checkpoint == "latest" else None


def mark_finished(args: Namespace, dataset: DreamBoothDataset, state: RunState) -> None:
    """Write the last file of a run, unless a picture that the flags ask for is missing."""
    if all((Path(args.output_dir) / name).exists() for name in final_pictures(args)):
        content = settings(args) | {"training pictures": fingerprint(dataset.sources), "state": asdict(state)}
        write_file(Path(args.output_dir) / RESULT_FILE, json.dumps(content, indent=2) + "\n")


# ============================================ 14. Results, model card, Hub ============================================

TRANSFORMER_FILES = "diffusion_pytorch_model{suffix}.safetensors"
LOADS = "FluxPipeline.from_pretrained"  # in a card's code
SINGLE_FILE = "transformer_bf16.safetensors"
COMPONENTS = ["scheduler/", "text_encoder/", "text_encoder_2/", "tokenizer/", "tokenizer_2/", "transformer/", "vae/"]
ON_REQUEST = ["image_*.png", SINGLE_FILE]
RESULTS = [
    "README.md",
    "model_index.json",
    *COMPONENTS,
    *ON_REQUEST,
]  # pushed, with the sheet; the second proves a result
SHEET_FILE, SHEET_ROWS, SHEET_CELL = "contact_sheet.jpg", 32, 256  # of validation pictures: most rows, pixels of a cell
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")  # whose versions a model card names


def save_results(args: Namespace, accelerator: Accelerator, trained: Trained, dtype: torch.dtype) -> None:
    """Write the whole pipeline, what was trained in `dtype`, into the output folder; called on all processes."""
    output, partial = Path(args.output_dir), Path(args.output_dir) / f".results{PARTIAL}"
    for model in trained.models:
        save_weights(accelerator, model, partial, dtype)
    if accelerator.is_main_process:
        written = [path.name for path in partial.iterdir()]
        t5 = from_base(T5EncoderModel, args, subfolder="text_encoder_2", dtype="auto")  # as in its file
        rest = from_base(FluxPipeline, args, text_encoder_2=t5, dtype=dtype, **dict.fromkeys(written))
        rest.save_pretrained(partial)
        try:  # transformers 4 cannot read the tokenizers that transformers 5 writes
            base, options = args.pretrained_model_name_or_path, hub_options(args, allow_patterns=["tokenizer*/*"])
            options.pop("variant", None)
            folder = Path(base) if Path(base).is_dir() else Path(snapshot_download(base, **options))
            for name in ("tokenizer", "tokenizer_2"):
                shutil.copytree(folder / name, partial / name, dirs_exist_ok=True)
        except Exception as error:  # as the Hub's client has them
            logger.warning(f"The base's tokenizers were not at hand, so that transformers 4 cannot load these: {error}")
        index = json.loads((partial / "model_index.json").read_text()) | {
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
        }
        (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        clip = partial / "text_encoder" / "model.safetensors"
        # transformers 4 would take other names for no weights, and draw with random ones; transformers 5 takes both.
        renamed = {f"text_model.{key.removeprefix('text_model.')}": value
                   for key, value in load(clip.read_bytes()).items()}  # fmt: skip
        save_file(renamed, clip, {"format": "pt"})
        if args.save_single_file:
            shards = [load_file(path) for path in sorted((partial / "transformer").glob("*.safetensors"))]
            whole = {name: weight.bfloat16() for shard in shards for name, weight in shard.items()}
            save_file(whole, partial / SINGLE_FILE, {"format": "pt"})
        for path in partial.iterdir():
            replace_path(path, output / path.name)
        partial.rmdir()
    accelerator.wait_for_everyone()


def save_weights(accelerator: Accelerator, model: nn.Module, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a model's weights in `dtype` and its config into `folder/<component>`; called on all processes."""
    state, unwrapped = whole_weights(accelerator, model, dtype), unwrap(model)
    if not accelerator.is_main_process:
        return
    name = component_name(unwrapped)
    if name == "transformer":
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(state, folder / name, filename_pattern=TRANSFORMER_FILES, max_shard_size="10GB")
        unwrapped.save_config(folder / name)
    else:
        unwrapped.save_pretrained(folder / name, state_dict=state)


def whole_weights(accelerator: Accelerator, model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The trained weights by name, in `dtype` or as trained, on the CPU of the main process; nothing on the others.

    Called on all processes: what is sharded is gathered tensor by tensor.
    """
    weights = {}
    for module in unwrap(model).modules():
        if hasattr(module, "reshard"):  # FSDP2 leaves some gathered, in bf16, after a forward without a backward pass
            module.reshard()
    for name, parameter in unwrap(model).named_parameters():
        if not parameter.requires_grad:
            continue
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            from deepspeed.utils import safe_get_full_fp32_param  # optional

            whole = safe_get_full_fp32_param(parameter)
        else:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # FSDP2's
        if accelerator.is_main_process:
            weights[name] = whole.detach().to("cpu", dtype)
    return weights


def load_results(args: Namespace, dtype: torch.dtype, device: torch.device) -> FluxPipeline:
    """The pipeline that was saved, as a user would load it, but for T5, whose embeddings are at hand."""
    return FluxPipeline.from_pretrained(args.output_dir, text_encoder_2=None, tokenizer_2=None, dtype=dtype)


def draw_final_pictures(
    args: Namespace, accelerator: Accelerator, prompts: list[PromptEmbeds], state: RunState, dtype: torch.dtype
) -> None:
    """Draw pictures from what was saved, which proves the files; `image_<n>.png` and the trackers."""
    mine: dict[int, Image.Image] = {}
    fits = contextlib.suppress(torch.OutOfMemoryError) if is_sharded(accelerator) else contextlib.nullcontext()
    # The first machine's processes share the work: another may not see what was saved.
    count, processes = args.num_validation_images * len(prompts), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    numbers = range(count)[accelerator.process_index :: processes]
    if accelerator.process_index == accelerator.local_process_index and numbers:
        with fits:
            pipeline = load_results(args, dtype, accelerator.device).to(accelerator.device)
            text_encoder = pipeline.text_encoder if args.train_text_encoder else None
            embeds = [embed_prompt(accelerator, text_encoder, prompt) for prompt in prompts]
            # In float16 the VAE's activations overflow.
            models = (pipeline.transformer.eval(), pipeline.vae.float() if dtype == torch.float16 else pipeline.vae)
            mine = sample_pictures(args, accelerator, *models, embeds, state.seed, numbers, "Final pictures")
    pictures = [picture for _, picture in sorted(gather_dicts(mine).items())]
    if len(pictures) < count:  # what is sharded may fit no GPU as a whole
        logger.warning("The final pictures were not drawn: the whole model does not fit one GPU. The result is saved.")
    elif accelerator.is_main_process:
        with warn_if_unwritable("The final pictures"):
            for number, picture in enumerate(pictures):
                save_picture(picture, Path(args.output_dir) / f"image_{number}.png")
        log_pictures(args, accelerator, "test", pictures, state.step)
    accelerator.wait_for_everyone()


def final_pictures(args: Namespace) -> dict[str, str]:
    """The files of the final pictures, and the prompt of each."""
    prompts = [] if args.skip_final_inference else args.validation_prompt or []
    repeated = [prompt for prompt in prompts for _ in range(args.num_validation_images)]
    return {f"image_{number}.png": prompt for number, prompt in enumerate(repeated)}


def loading_code(args: Namespace, source: str, base: str) -> str:
    """Python that loads what was trained from `source`, a folder or a repository, and draws with it."""
    prompt = (args.validation_prompt or [args.instance_prompt or args.trigger_word or "a prompt like the captions"])[0]
    width, height = validation_size(args)
    return f"""import torch
from diffusers import FluxPipeline

# 33 GiB; on a smaller GPU without .to("cuda"), and pipeline.enable_sequential_cpu_offload() before drawing
pipeline = FluxPipeline.from_pretrained({json.dumps(source, ensure_ascii=False)}, torch_dtype=torch.bfloat16).to("cuda")
options = {{"width": {width}, "height": {height}, "max_sequence_length": {args.max_sequence_length}}}
image = pipeline({prompt!r}, **options).images[0]
image.save("image.png")"""


def describe_training(args: Namespace, accelerator: Accelerator, pictures: Pictures, state: RunState) -> str:
    """Rows of the model card: what was trained on, for how long and on what; flags that differ from their defaults."""
    read = getattr(torch.get_device_module(accelerator.device), "get_device_name", None)
    device = read(accelerator.device) if read else accelerator.device.type.upper()
    per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    prompts = len({picture.prompt for picture in pictures["instance"]})
    prior = f", {args.num_class_images} of the class" if args.with_prior_preservation else ""
    held_out = f", {len(pictures['validation'])} held out" if "validation" in pictures else ""
    ends = ("_dir", "_path", "_checkpoint", "_lora", "dataset_name")
    given = {name: Path(value) for name, value in vars(args).items() if name.endswith(ends) and value}
    paths = {name: path.name for name, path in given.items() if path.is_absolute()}  # nobody's home folder
    shown = Namespace(**vars(args) | paths | {"output_dir": OUTPUT_DIR, "scale_lr": False})  # the rate is scaled
    flags = [f"    {line}" for line in flag_lines(shown)]
    rows = [
        f"- pictures: {len(pictures['instance'])} of the subject ({prompts} prompts){prior}{held_out}",
        f"- {state.step} steps of {per_step} pictures each, in {tqdm.format_interval(state.seconds)}",
        f"- {accelerator.num_processes} x {device}, mixed precision {accelerator.mixed_precision}, seed {state.seed}",
        "- " + ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    ]
    return "\n".join([*rows, "\nFlags; all others had their defaults:\n", *flags])


def write_model_card(
    args: Namespace, accelerator: Accelerator, repo_id: str, pictures: Pictures, state: RunState
) -> None:
    """Write README.md for the Hub: gallery, trigger words, code that loads the result, what was trained, licence."""
    output, base, images = Path(args.output_dir), args.pretrained_model_name_or_path, final_pictures(args)
    local = Path(base).exists()
    licence = "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    data = ModelCardData(
        base_model=None if local else base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license="other",
        license_name="flux-1-dev-non-commercial-license",
        license_link=licence,
        instance_prompt=args.instance_prompt or args.trigger_word,
        widget=[{"text": prompt, "output": {"url": name}} for name, prompt in images.items()],
        tags=["text-to-image", "diffusers", "diffusers-training", "flux", "flux-diffusers", "dreambooth", *TAGS],
    )
    clip = "CLIP was trained too" if args.train_text_encoder else "The text encoders were not trained"
    sheet = f"![steps down, prompts across]({SHEET_FILE})\n\n" if (output / SHEET_FILE).exists() else ""
    text = f"""---
{data.to_yaml()}
---

# {repo_id.split("/")[-1]}

A DreamBooth {KIND} of {f"`{Path(base).name}`" if local else f"[{base}](https://huggingface.co/{base})"}, trained for
{state.step} steps at {", ".join(map(str, resolutions(args)))} px. {clip}.

{"<Gallery />" if images else ""}

## Trigger words

    {args.instance_prompt or args.trigger_word or "the words of the captions"}

## Use it

```python
{loading_code(args, repo_id, Path(base).name if local else base)}
```

## Training

{sheet}{describe_training(args, accelerator, pictures, state)}

## Licence

FLUX.1 [dev]'s: [non-commercial]({licence}).
"""
    write_file(output / "README.md", str(ModelCard(text)))


def name_repository(args: Namespace, repo_id: str) -> None:
    """In the code of the card that stands, whose text may be the user's, load the result from the repository."""
    card, name = Path(args.output_dir) / "README.md", json.dumps(repo_id, ensure_ascii=False)
    loaded = rf'(?<={re.escape(LOADS)}\()"(?:\\.|[^"\\])*"'
    write_file(card, re.sub(loaded, lambda _: name, card.read_text(encoding="utf-8")))


def closing_summary(args: Namespace, state: RunState) -> str:
    """What a finished run says: where everything is, and the code that uses the result."""
    output, took = Path(args.output_dir), tqdm.format_interval(state.seconds)
    made = ", ".join(name for name in (*RESULTS, SHEET_FILE, "checkpoint-*") if any(output.glob(name)))
    logs = f"\n  Curves: {output / args.logging_dir}" if (output / args.logging_dir).is_dir() else ""
    code = textwrap.indent(loading_code(args, args.output_dir, args.pretrained_model_name_or_path), "    ")
    return f"Done: {state.step} steps in {took}. In {output}: {made}{logs}\n  To use the result:\n{code}"


def create_repository(args: Namespace) -> str:
    """Make the Hub's repository if need be, before anything expensive; returns its full name."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        api = HfApi(token=args.hub_token)
        repo_id = api.create_repo(name, exist_ok=True).repo_id
        with contextlib.suppress(RepositoryNotFoundError):  # a mirror of the Hub may not know the question
            api.auth_check(repo_id, write=True)  # `create_repo` takes one that may only be read
        return repo_id
    except Exception as error:  # whatever it is, the push would fail after hours
        raise UsageError(
            f"--push_to_hub: the Hub refused the repository {name!r}: {error}\n"
            "  log in with `hf auth login`, give --hub_token or --hub_model_id, or leave --push_to_hub out"
        ) from error


def push_to_hub(args: Namespace, repo_id: str) -> None:
    """Upload the result, the card and its pictures: no checkpoints, no logs."""
    pushed = [*RESULTS, SHEET_FILE]
    try:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=repo_id, folder_path=args.output_dir, allow_patterns=pushed, commit_message="End of training"
        )
    except Exception as error:  # whatever it is, the result must not be lost with it
        include = " ".join(f"--include={shlex.quote(pattern)}" for pattern in pushed)
        raise RunError(
            f"the upload to {repo_id} failed ({error}). The result is whole in {args.output_dir}; to push again: "
            f"hf upload {repo_id} {shlex.quote(args.output_dir)} . {include}"
        ) from error
    logger.info(f"Uploaded the result to {repo_id}")


# =========================================== 15. Signals, stages, progress ============================================

GIB = 1024**3
LAUNCHER = psutil.Process().parent() if "ACCELERATE_MIXED_PRECISION" in os.environ else None  # set by the launcher
LOG_SECONDS, SMOOTHED_STEPS = 30, 50  # between two lines in a log file; steps that a shown loss is the mean of
STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


def launcher_is_gone() -> bool:
    """Whether the process that launched this one has ended; False without a launcher."""
    return LAUNCHER is not None and (psutil.Process().ppid() != LAUNCHER.pid or not LAUNCHER.is_running())


class StopSignals:
    """Remembers a signal that asks to stop, so that the step can end and a checkpoint be written.

    SIGTERM, SIGINT, SIGUSR1 (a cluster's warning) and SIGHUP (a closed terminal) count, and so does a launcher that
    has gone away. A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopSignals:
        wanted = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self.previous = {number: signal.signal(number, self.remember) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def remember(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with contextlib.suppress(OSError):  # the terminal may be what has gone
                waits = "; a second ^C does not wait" if LAUNCHER is None else "; the prompt may be back before that"
                again = waits if number == signal.SIGINT else ""
                os.write(2, f"\n{self.received.name}: stopping once this step is saved{again}\n".encode())

    def pending(self) -> int:
        """The number of the signal that asks to stop, or 0."""
        if self.received is None and launcher_is_gone():
            self.received = signal.SIGTERM
        return 0 if self.received is None else int(self.received)


def ignore_signals(_: int) -> None:
    """In the processes that load pictures: the training decides when they end."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def stop_run(run: Run, number: int, saved: str) -> None:
    """Leave after `saved` was written because of signal `number`, which another process may have got."""
    step = run.state.step
    number = max(gather_object([number]))
    logger.warning(
        f"Stopped by {signal.Signals(number).name} at step {step}; {saved} is saved. "
        "To go on: the same command with --resume_from_checkpoint=latest"
    )
    end_training(run.accelerator)
    # With the launcher went torch's store, which the process may wait for at its end; one of several may wait for
    # itself, where DDP is freed after its group.
    if launcher_is_gone() or run.accelerator.num_processes > 1:
        unlock_folders()
        sys.stdout.flush()
        os._exit(128 + number)
    raise SystemExit(128 + number)


@contextlib.contextmanager
def stage(args: Namespace, accelerator: Accelerator, name: str) -> Iterator[None]:
    """Announce a stage; when it ends, return freed memory to the device and log time and peak memory."""
    gc.collect()  # wrapped models are cycles: the last stage's would stand beside what this one loads
    logger.info(name)
    reset = getattr(torch.get_device_module(accelerator.device), "reset_peak_memory_stats", None)
    if reset is not None:
        reset(accelerator.device)
    start = time.perf_counter()
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        used = ", ".join(f"{key} {value:.2f} GiB" for key, value in peak_memory(accelerator.device).items())
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise RunError(
            f"out of memory while: {name} ({used}; {reason}). To use less: --gradient_checkpointing of all blocks, "
            f"--cache_latents, --mixed_precision=bf16, {LESS_MEMORY}, smaller --train_batch_size, --sample_batch_size "
            "or --resolution; `python tools/memory_plan.py` with this command says which of them fit"
        ) from error
    clear_device_cache(garbage_collection=True)
    memory = peak_memory(accelerator.device).items()
    peak = ", ".join(f"{key.replace('_', ' ')} {value:.2f} GiB" for key, value in memory)
    logger.info(f"{name}: {time.perf_counter() - start:.1f} s, {peak}")


def peak_memory(device: torch.device) -> dict[str, float]:
    """Highest use so far in GiB: of the device since the stage began, where it can say, and of this process."""
    try:
        import resource  # not on Windows; psutil knows the peak only there

        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        memory = psutil.Process().memory_info()
        host = getattr(memory, "peak_wset", memory.rss)
    peak = {"peak_host_memory": host / GIB}
    read = getattr(torch.get_device_module(device), "memory_stats", None)
    # Active, not allocated: what a stream still reads has been given back by name only.
    return peak if read is None else peak | {"peak_device_memory": read(device).get("active_bytes.all.peak", 0) / GIB}


class Progress:
    """The line by which a training is watched: redrawn on a terminal; in a log file, a new one every LOG_SECONDS."""

    def __init__(self, run: Run, schedule: MicroBatches) -> None:
        self.state, self.schedule, self.last_line = run.state, schedule, -math.inf
        self.recent: deque[dict[str, float]] = deque(maxlen=SMOOTHED_STEPS)
        hidden = not run.accelerator.is_local_main_process or None  # None: where there is no terminal
        form, last = "{percentage:3.0f}%|{bar:10}| {desc}", schedule.last_step
        self.bar = tqdm(initial=run.state.step, total=last, bar_format=form, dynamic_ncols=True, disable=hidden)

    def update(self, values: dict[str, float]) -> None:
        """Show what `log_step` returned for a step; loss and seconds are means of the last SMOOTHED_STEPS."""
        self.recent.append(values)
        loss, seconds = (sum(past[name] for past in self.recent) / len(self.recent) for name in ("loss", "step_time"))
        step, last = self.state.step, self.schedule.last_step
        text = (
            f"step {step}/{last}, {tqdm.format_interval(seconds * (last - step))} left, "
            f"epoch {math.ceil(step / self.schedule.steps_per_epoch)}, loss {loss:.4f}, lr {values['lr']:.2g}, "
            f"{seconds:.2f} s/step, {values.get('peak_device_memory', values['peak_host_memory']):.1f} GiB"
        )
        self.bar.set_description_str(text, refresh=False)
        with contextlib.suppress(OSError):  # a terminal that has gone
            self.bar.update()
        if self.bar.disable and (step == last or time.monotonic() - self.last_line >= LOG_SECONDS):
            logger.info(text)
            self.last_line = time.monotonic()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.bar.close()


if __name__ == "__main__":
    gc.freeze()  # the libraries' objects stay: each collection would spend 0.3 s on them
    try:
        main(parse_args())
    except (UsageError, RunError) as error:
        where = f", process {os.environ['RANK']}" if os.environ.get("RANK", "0") != "0" else ""
        print(f"{Path(__file__).name}{where}: error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except KeyboardInterrupt:
        print(f"{Path(__file__).name}: interrupted; checkpoints written so far are whole", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
