#!/usr/bin/env python
# Copyright 2026 The FLUX DreamBooth authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# ruff: noqa: E402

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<2.14", "diffusers~=0.42.1", "transformers~=5.23.0", "accelerate~=1.15.0", "peft~=0.21.2",
#   "huggingface_hub~=2.4.0", "safetensors~=0.8.0", "tokenizers~=0.23.3", "numpy~=2.4.6", "Pillow~=13.0",
#   "tqdm~=4.70", "filelock~=4.2", "psutil>=6,<8", "sentencepiece~=0.2.3", "protobuf~=7.36.2", "datasets~=5.2.0",
#   "bitsandbytes~=0.50.2", "prodigyopt~=1.1.2", "tensorboard~=2.21.0", "wandb~=0.31.0",
# ]
# ///
"""DreamBooth for FLUX.1 [dev] with LoRA: teach the model a subject by training adapters of a frozen transformer.

    accelerate launch train_dreambooth_lora_flux.py --pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev \
        --instance_data_dir=dog --instance_prompt="a photo of sks dog" --output_dir=trained-flux-lora \
        --mixed_precision=bf16 --resolution=512 --train_batch_size=1 --guidance_scale=1 --gradient_checkpointing \
        --cache_latents --rank=16 --lora_alpha=16 --learning_rate=1e-4 --max_train_steps=500 \
        --validation_prompt="A photo of sks dog in a bucket" --seed=0

The adapters are held in float32 (45 MB at rank 4, 179 MB at rank 16); the base stays frozen and runs in the precision
of `--mixed_precision`. With `--train_text_encoder`, CLIP gets adapters too; T5 is only ever used to encode the prompts.

To change something, edit this. All but the flags is in part one.
    a flag                      a line of `make_parser` (section 8); in the loss it is `options.NAME`, else `args.NAME`
    the loss, or its target     `flow_matching_loss`, `training_loss`: all they may depend on is in `StepInputs`
    a number that is logged     `log_step`; one of the loss: an entry of what `training_loss` returns
    noise, and its levels       `prepare_inputs`, `sample_sigmas`; `validation_loss` has its own
    what an example holds       `load_picture`; from there to the loss: `prepare_inputs`, `StepInputs`
    prompts and captions        `Picture.choose_prompt`; where they come from: `pictures_in_folder` (section 9)
    the crop, the flip          `load_picture`
    which layers are trained    `TRANSFORMER_TARGETS`; from which weights: `load_transformer`, `add_adapter`
    an optimizer, its rates     `OPTIMIZERS`, `parameter_groups`; the schedule of the rates: `make_lr_scheduler`
    validation pictures         `draw_validation_pictures`
    files saved on the way      `save_checkpoint` (section 13); the result: `save_result` (section 14)
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import importlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

for library in ("DIFFUSERS", "TRANSFORMERS"):  # they warn, as they are imported, of packages that are not needed
    os.environ.setdefault(f"{library}_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # so does this one
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # else up to 6 GiB are lost to fragments
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import accelerate
import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, InitProcessGroupKwargs, gather_object
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.training_utils import compute_density_for_timestep_sampling as draw_density
from diffusers.training_utils import compute_loss_weighting_for_sd3 as loss_weighting
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
from filelock import FileLock
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import CLIPTextModel
from transformers.hf_argparser import string_to_bool

logger = logging.getLogger(__name__)

KIND, TAGS, PROJECT = "LoRA", ["lora", "template:sd-lora"], "dreambooth-flux-dev-lora"
OUTPUT_DIR, TEXT_LENGTH = "flux-dreambooth-lora", 512  # defaults
TRANSFORMER_TARGETS = [  # the attention and feed-forward layers of the double blocks, attention of the single blocks
    "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
]  # fmt: skip
TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PIXELS_PER_TOKEN = 16  # the VAE shrinks by 8, packing by 2: a side must be a multiple of this
ASPECT_RATIOS = (1, 7 / 6, 4 / 3, 3 / 2, 7 / 4, 2, 5 / 2, 3)  # of automatic buckets, with their inverses
VALIDATION_SIGMAS = 8  # noise levels of the validation loss


# ==================================================== 1. The story ====================================================


def main(args: Namespace) -> None:
    """The story of a run. What a stage loads is freed when its function returns: the peak is the largest stage."""
    accelerator = make_accelerator(args)
    with accelerator.main_process_first():  # what can go wrong goes wrong here, before a model is loaded
        check_model(args)
        pictures = list_pictures(args)
        resumed = find_checkpoint(args)
    state = RunState.start(args, resumed)
    repo_id, _lock = prepare_output(args, accelerator, resumed, state)  # `_lock` keeps other runs out
    class_pictures = prepare_class_pictures(args, accelerator, state.seed)  # draws those that are missing
    dataset = DreamBoothDataset(pictures["instance"], class_pictures, args, state.seed)
    schedule = make_schedule(args, accelerator, dataset, state)
    start_trackers(args, accelerator)
    data = prepare_data(args, accelerator, dataset, schedule, pictures)  # prompts to embeddings, pictures to latents
    train_and_save(args, accelerator, data, state, resumed)
    if accelerator.is_main_process:
        images: list = []
        if args.validation_prompt and not args.skip_final_inference:
            embeds = [data.prompts[prompt] for prompt in args.validation_prompt]
            del data  # and with it the VAE: what was saved brings its own
            with stage(accelerator, "Drawing the final pictures"):
                images = draw_final_pictures(args, accelerator, embeds, state)
        write_model_card(args, repo_id, images, state)
        if args.push_to_hub:
            push_to_hub(args, repo_id)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    logger.info(f"Done: {state.step} steps in {state.seconds:.0f} s; the result is in {args.output_dir}")


def train_and_save(
    args: Namespace, accelerator: Accelerator, data: TrainingData, state: RunState, resumed: Path | None
) -> None:
    """Load the transformer, go on from a checkpoint, train, save the result. All its memory is free when it returns."""
    with stage(accelerator, "Loading the transformer"):
        run = prepare_training(args, accelerator, data, state)
    if resumed is not None:
        load_checkpoint(run, resumed)
    with run.signals:
        with stage(accelerator, "Training"), logging_redirect_tqdm():
            if state.step == 0:
                validate(run)
            train(run)
        with stage(accelerator, "Saving the result"):
            save_result(run)
        if run.asked_to_stop():
            run.stop(f"the result is in {args.output_dir}; only its pictures and model card are missing")
    accelerator.free_memory()


def train(run: Run) -> None:
    """The loop: from `state.step` to `--max_train_steps`, with validation and checkpoints on the way."""
    args, accelerator, state, schedule = run.args, run.accelerator, run.state, run.data.schedule
    loader = DataLoader(
        run.data.dataset, batch_sampler=schedule, collate_fn=collate,
        num_workers=args.dataloader_num_workers, worker_init_fn=StopSignals.ignore,
    )  # fmt: skip
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines of progress; long in a log file
    progress = tqdm(
        initial=state.step, total=args.max_train_steps, mininterval=interval, disable=not accelerator.is_main_process
    )
    sums: dict = {}  # what `training_loss` returns, summed over an optimizer step
    start = time.perf_counter()
    for batch in loader:
        key = batch["keys"][0]
        accelerator.sync_gradients = key.last
        for model in run.models:  # DDP shares gradients at the end of a step only
            model.require_backward_grad_sync = key.last
        # Dropout still draws from the global generator: seeded here, it is repeatable too.
        torch.manual_seed(generator_for(state.seed, "dropout", key.epoch, key.position).initial_seed())
        inputs = prepare_inputs(run, batch)
        if run.text_encoder is not None:
            inputs.pooled_prompt_embeds = run.text_encoder(inputs.clip_ids).pooler_output
        losses = training_loss(run.transformer, inputs)
        # `loss_weights` already make it a mean over the step: undo accelerate's division, and DDP's by the processes.
        accelerator.backward(losses["loss"] * accelerator.gradient_accumulation_steps * accelerator.num_processes)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach()
        if not key.last:
            continue

        grad_norm = accelerator.clip_grad_norm_(run.parameters, args.max_grad_norm or math.inf)
        run.optimizer.step()
        run.lr_scheduler.step()
        run.optimizer.zero_grad()
        state.step += 1

        log_step(run, progress, sum_over_processes(sums), grad_norm, time.perf_counter() - start)
        stop = run.asked_to_stop()
        if stop or state.step % args.checkpointing_steps == 0:
            save_checkpoint(run)
        if stop:
            run.stop(f"checkpoint-{state.step} is saved: go on with --resume_from_checkpoint=latest")
        epochs_done, step_in_epoch = divmod(state.step, schedule.steps_per_epoch)
        is_due = step_in_epoch == 0 and (epochs_done - 1) % args.validation_epochs == 0
        if is_due or (args.validation_steps and state.step % args.validation_steps == 0):
            validate(run)
        sums = {}
        start = time.perf_counter()


def log_step(run: Run, progress: tqdm, losses: dict, grad_norm: Tensor, seconds: float) -> None:
    """Log the losses of an optimizer step, which are means over its examples; stop the run if they are not finite."""
    run.check_finite(losses["loss"], grad_norm)
    run.state.seconds += seconds
    lr = run.lr_scheduler.get_last_lr()[0]
    values = {**losses, "lr": lr, "grad_norm": float(grad_norm), "step_time": seconds}
    if "d" in run.optimizer.param_groups[0]:  # Prodigy's estimate of the step size
        values["prodigy_d"] = float(run.optimizer.param_groups[0]["d"])
    run.accelerator.log(values, step=run.state.step)
    progress.set_postfix(loss=f"{losses['loss']:.4f}", lr=f"{lr:.2g}", refresh=False)
    with contextlib.suppress(OSError):  # a terminal that has gone
        progress.update()


@dataclass
class StepInputs:
    """All that the loss of a micro-batch may depend on, on the device.

    B counts all pictures. With prior preservation the first half are instance pictures, the second class pictures;
    in a step with the prior of the base the second half repeats pictures, noise and sigmas with prompts of the class.
    """

    latents: Tensor  # (B, C, H, W), scaled, float32
    noise: Tensor  # (B, C, H, W), float32
    sigmas: Tensor  # (B,), float32
    prompt_embeds: Tensor  # (B, T, D), from T5, in the precision in which the model runs
    pooled_prompt_embeds: Tensor  # (B, P), from CLIP; if that is trained, `train` replaces it
    loss_weights: Tensor  # (B,): 1 / instance pictures of the step; in a second half times the prior's weight
    options: Namespace  # every flag by its name
    clip_ids: Any = None  # (B, 77), for a CLIP that is trained
    token_weights: Tensor | None = None  # (B, L), of masks, if there are any
    base_inputs: StepInputs | None = None  # inputs of the base model, which predicts the target of the second half

    def to(self, device: torch.device) -> StepInputs:
        """Move the tensors to the device, in place; a copy from page-locked memory does not wait for earlier work."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.is_cpu:
                if device.type == "cuda":
                    value = value.pin_memory()
                setattr(self, name, value.to(device, non_blocking=True))
        return self


def prepare_inputs(run: Run, batch: dict) -> StepInputs:
    """Turn what `collate` made of a micro-batch into the inputs of its loss; all that is random is drawn here."""
    args, data, seed, keys = run.args, run.data, run.state.seed, batch["keys"]
    loss_weights = batch["loss_weights"]
    draws = [("instance", key.epoch, key.position) for key in keys]  # seeds the random draws of each picture
    if len(batch["prompts"]) > len(keys):  # class pictures follow
        draws += [("class", key.epoch, key.position) for key in keys]
        loss_weights = torch.cat([loss_weights, args.prior_loss_weight * loss_weights])

    posterior = batch["posterior"] if "posterior" in batch else encode_pixels(data.vae, batch["pixels"])
    mean, std = posterior.unbind(dim=1)
    shape = mean.shape[1:]
    sample = mean + std * draw_normal(shape, seed, "posterior", draws).to(mean.device)
    shift = flow_shift(args.flow_shift, shape[1] // 2 * (shape[2] // 2), data.scheduler.config)
    generators = [generator_for(seed, "sigma", *draw) for draw in draws]
    text = default_collate([data.prompts[prompt] for prompt in batch["prompts"]])
    inputs = StepInputs(
        latents=(sample - data.vae.config.shift_factor) * data.vae.config.scaling_factor,
        noise=draw_normal(shape, seed, "noise", draws),
        sigmas=sample_sigmas(generators, data.scheduler.sigmas, args, shift),
        loss_weights=loss_weights, token_weights=batch.get("token_weights"), options=args, **text._asdict(),
    ).to(run.accelerator.device)  # fmt: skip
    period = round(1 / args.prior_share)  # steps, of which one has the prior, the same on all processes
    drawn = torch.randint(period, (), generator=generator_for(seed, "prior", run.state.step // period))
    if args.prior_from_base_model and drawn == run.state.step % period:
        prompts = [prior_prompt(args, prompt) for prompt in batch["prompts"]]
        inputs = add_base_prior(inputs, default_collate([data.prompts[prompt] for prompt in prompts]))
    return inputs


def add_base_prior(inputs: StepInputs, text: PromptEmbeds) -> StepInputs:
    """Repeat the B pictures with the B prompts of `text`; there the base's own velocity becomes the target."""
    weights = inputs.loss_weights * (inputs.options.prior_loss_weight / inputs.options.prior_share)
    prior = replace(inputs, **text._asdict(), loss_weights=weights).to(inputs.latents.device)
    if inputs.token_weights is not None:
        prior.token_weights = torch.ones_like(inputs.token_weights)  # a mask does not count in the prior
    doubled = replace(inputs, base_inputs=prior)
    for name, value in vars(inputs).items():
        if isinstance(value, Tensor):
            setattr(doubled, name, torch.cat([value, getattr(prior, name)]))
    return doubled


def prior_prompt(args: Namespace, prompt: str) -> str:
    """The prompt of the class that goes with a picture of this prompt, for `--prior_from_base_model`."""
    if args.class_word:
        return word_pattern(args.trigger_word).sub(lambda _: args.class_word, prompt)
    return args.class_prompt


# ================================================== 2. Flow matching ==================================================
#
# B pictures, C latent channels, H x W latent height and width (pixels / 8), L = H/2 * W/2 image tokens, T text tokens,
# D and P the widths of T5 and CLIP. sigma 1 is pure noise; the model predicts the velocity `noise - latents`.


def training_loss(transformer: nn.Module, inputs: StepInputs) -> dict[str, Tensor]:
    """From latents, noise and sigmas to the loss of a micro-batch, in training and validation (of one picture) alike.

    With prior preservation the second half of each tensor is the prior's; its target may be the base's velocity.

    Returns scalars by name, each a sum over the pictures times `loss_weights`: "loss" is minimized and logged, any
    other is only logged under its name, and need not be there in every micro-batch.
    """
    target = pack_latents(inputs.noise - inputs.latents)
    if inputs.base_inputs is not None:
        instance_target, _ = target.chunk(2)
        target = torch.cat([instance_target, predict_base_velocity(transformer, inputs.base_inputs)])
    velocity = predict_velocity(transformer, inputs)
    losses = flow_matching_loss(velocity, target, inputs.sigmas, inputs.options, inputs.token_weights)
    weighted = inputs.loss_weights * losses
    named = {"loss": weighted.sum()}
    if inputs.base_inputs is not None:
        instance_losses, prior_losses = weighted.chunk(2)
        named |= {"instance_loss": instance_losses.sum(), "prior_loss": prior_losses.sum()}
    return named


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
        shares = token_weights / token_weights.mean(dim=1, keepdim=True).clamp(min=1e-6)
        errors = errors * shares[:, :, None]
    return loss_weighting(options.weighting_scheme, sigmas) * errors.mean(dim=(1, 2))


def predict_velocity(transformer: nn.Module, inputs: StepInputs) -> Tensor:
    """Predict the packed velocity, (B, L, 4C). The model takes sigma as its timestep; DDP may be around it."""
    dtype, device = inputs.prompt_embeds.dtype, inputs.latents.device
    height, width = inputs.latents.shape[-2:]
    guidance = None  # FLUX.1 [schnell] takes none
    if unwrap(transformer).config.guidance_embeds:
        guidance = torch.full_like(inputs.sigmas, inputs.options.guidance_scale)
    return transformer(
        hidden_states=pack_latents(add_noise(inputs.latents, inputs.noise, inputs.sigmas)).to(dtype),
        timestep=inputs.sigmas, guidance=guidance, return_dict=False,
        encoder_hidden_states=inputs.prompt_embeds, pooled_projections=inputs.pooled_prompt_embeds.to(dtype),
        txt_ids=torch.zeros(inputs.prompt_embeds.shape[1], 3, device=device),
        img_ids=make_image_ids(height, width, device),
    )[0]  # fmt: skip


@torch.no_grad()
def predict_base_velocity(transformer: nn.Module, inputs: StepInputs) -> Tensor:
    """What the model predicts with neither its adapters nor CLIP's: (B, L, 4C)."""
    adapters = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for adapter in adapters:
        adapter._disable_adapters = True  # peft's own switch would also set requires_grad, under which DDP fails
    velocity = predict_velocity(transformer, inputs)
    for adapter in adapters:
        adapter._disable_adapters = False
    return velocity


def sample_sigmas(generators: list, sigma_table: Tensor, options: Namespace, shift: float) -> Tensor:
    """Draw one noise level a picture, with a generator each: (B,), float32.

    u in [0, 1) is drawn by `--weighting_scheme` (logit_normal and mode: https://arxiv.org/abs/2403.03206, section 3.1;
    the others uniformly) and looked up in the scheduler's table, which falls from 1 (noise), so that a larger u is less
    noise. It contains the static shift; a `shift` above 1 moves sigma towards 1 (the same paper, equation 23).
    """
    u = torch.cat([draw_density(
        options.weighting_scheme, 1, options.logit_mean, options.logit_std, options.mode_scale, generator=generator
    ) for generator in generators])  # fmt: skip
    index = (u * len(sigma_table)).long().clamp(0, len(sigma_table) - 1)
    sigmas = sigma_table[index].float()
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_shift(setting: Any, tokens: int, config: Any) -> float:
    """The shift for a picture of L image tokens: "dynamic" is exp(mu) of FLUX.1's sampler, mu linear in L."""
    if setting != "dynamic":
        return setting
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return math.exp(config.base_shift + slope * (tokens - config.base_image_seq_len))


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Latents (B, C, H, W) on their straight path to noise, at sigmas (B,); https://arxiv.org/abs/2210.02747."""
    sigmas = sigmas.view(-1, 1, 1, 1)
    return (1 - sigmas) * latents + sigmas * noise


def pack_latents(latents: Tensor) -> Tensor:
    """Each 2 x 2 patch of latents (B, C, H, W) becomes a token: (B, L, 4C), four values of each channel in turn."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()


def make_image_ids(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Position of each token, (L, 3): zero, row, column, for latents of `height` x `width`."""
    zero = torch.zeros(1, device=device)
    rows, columns = torch.arange(height // 2, device=device), torch.arange(width // 2, device=device)
    return torch.cartesian_prod(zero, rows.float(), columns.float())


# ============================ 3. Data: what a picture is, and what an example holds of it =============================

Size = tuple[int, int]  # width and height in pixels
Pictures = dict[str, list["Picture"]]  # by source: "instance", "class", and "validation" for those held out


@dataclass(frozen=True)
class Picture:
    """One picture and its prompts."""

    name: str
    open: Callable[[], Image.Image]  # as it is stored
    prompts: tuple[str, ...]  # one; an edit may add more for `choose_prompt`, and all of them are encoded
    mask: Path | str | None = None  # a file, or "alpha" for the picture's own transparency
    size: Size = (1, 1)  # of the upright picture; `check_pictures` finds it

    def choose_prompt(self, args: Namespace, generator: torch.Generator) -> str:
        """The prompt of a training step; empty in `--caption_dropout` of them."""
        if torch.rand((), generator=generator) < args.caption_dropout:
            return ""
        return self.prompts[0]

    def read(self) -> tuple[Image.Image, Image.Image]:
        """The upright picture in 8-bit RGB, and its mask in 8-bit grey; without a mask white, which counts fully."""
        with self.open() as stored:
            image = to_rgb(stored)
            if self.mask == "alpha":
                return image, ImageOps.exif_transpose(stored).convert("RGBA").getchannel("A")
        if self.mask is None:
            return image, Image.new("L", image.size, "white")
        with Image.open(self.mask) as stored:
            return image, to_rgb(stored, "black").convert("L")  # transparent parts of a mask count as black


@functools.lru_cache(maxsize=256)  # decoding a photo of 24 megapixels takes half a second
def read_resized(picture: Picture, size: Size, mode: str) -> Tensor:
    """The picture resized to cover `size`, its mask as a fourth channel: (height, width, 4), 8 bits."""
    image, mask = picture.read()
    covering = resized_size(image.width, image.height, size)
    resample = Image.Resampling[mode.upper()]
    channels = [np.asarray(image.resize(covering, resample)), np.asarray(mask.resize(covering, resample))]
    return torch.from_numpy(np.dstack(channels))


def load_picture(
    picture: Picture, size: Size, args: Namespace, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """What an example holds of a picture: cropped to `size` and mirrored by `generator`; without one, its centre."""
    pixels = read_resized(picture, size, args.image_interpolation_mode)
    spare_height, spare_width = pixels.shape[0] - size[1], pixels.shape[1] - size[0]
    left, top = round(spare_width / 2), round(spare_height / 2)
    if generator is not None and not args.center_crop:
        left = int(torch.randint(spare_width + 1, (), generator=generator))
        top = int(torch.randint(spare_height + 1, (), generator=generator))
    pixels = pixels[top : top + size[1], left : left + size[0]]
    if generator is not None and args.random_flip and torch.rand((), generator=generator) < 0.5:
        pixels = pixels.flip(1)
    loaded = {"pixels": pixels[:, :, :3].permute(2, 0, 1) / 127.5 - 1}  # (3, height, width), float32 in [-1, 1]
    if args.mask_data_dir or args.alpha_mask:  # the weight of each token's loss, (L,): the mean over its 16 x 16 pixels
        mask = pixels[None, :, :, 3].float() / 255
        shares = nn.functional.avg_pool2d(mask, PIXELS_PER_TOKEN).flatten()
        loaded["token_weights"] = args.unmasked_weight + (1 - args.unmasked_weight) * shares
    return loaded


class DreamBoothDataset(Dataset):
    """Instance pictures, repeated `--repeats` times, each paired with a class picture if there are any."""

    def __init__(
        self, instance_pictures: list[Picture], class_pictures: list[Picture], args: Namespace, seed: int
    ) -> None:
        self.args, self.seed = args, seed
        self.sources: Pictures = {"instance": []}
        sizes: list[Size] = []
        enlarged: list[str] = []
        for resolution in args.resolution:
            for picture in instance_pictures:
                size = nearest_size(picture.size, training_sizes(args, resolution))
                if resized_size(*picture.size, size)[0] > picture.size[0]:  # it has too few pixels for this size
                    if resolution > min(args.resolution):
                        continue
                    enlarged.append(picture.name)
                self.sources["instance"] += [picture] * args.repeats
                sizes += [size] * args.repeats
        if enlarged:
            logger.warning(f"Pictures smaller than --resolution are enlarged: {shorten(enlarged)}")
        if class_pictures:
            self.sources["class"] = class_pictures
        # The size of each example: that of its instance picture, to which the class picture is cropped too.
        self.buckets = [sizes[index % len(sizes)] for index in range(len(self))]
        self.cached: dict | None = None  # by source, index and bucket

    def __len__(self) -> int:
        return max(len(pictures) for pictures in self.sources.values())

    @property
    def prompts(self) -> list[str]:
        """Every prompt that `__getitem__` may give: they are encoded before the training, no other is."""
        prompts = [""] if self.args.caption_dropout else []
        for picture in itertools.chain.from_iterable(self.sources.values()):
            prompts += picture.prompts
        return prompts

    def load(self, source: str, index: int, size: Size, epoch: int, position: int) -> dict:
        """A picture at `size`, cropped anew for each epoch and position."""
        generator = generator_for(self.seed, "view", source, epoch, position)
        return load_picture(self.sources[source][index], size, self.args, generator)

    def __getitem__(self, key: ExampleKey) -> dict:
        example: dict = {"key": key}
        size = self.buckets[key.example]
        for source, pictures in self.sources.items():
            index = key.example % len(pictures)
            if self.cached is None:
                loaded = self.load(source, index, size, key.epoch, key.position)
            else:
                loaded = self.cached[source, index, size]
            prompt = pictures[index].prompts[0]
            if source == "instance":
                generator = generator_for(self.seed, "caption dropout", key.epoch, key.position)
                prompt = pictures[index].choose_prompt(self.args, generator)
            example[source] = {"prompt": prompt, **loaded}
        return example


def collate(examples: list[dict]) -> dict:
    """B examples as one batch of B pictures, or of 2B: all instance pictures, then all class pictures.

    "keys" has B, "loss_weights" (B,), "prompts" B or 2B; "pixels" is (B or 2B, 3, 8H, 8W), or "posterior"
    (B or 2B, 2, C, H, W), and so with all of `load_picture`.
    """
    pictures = [example["instance"] for example in examples]
    if "class" in examples[0]:
        pictures += [example["class"] for example in examples]
    batch = default_collate(pictures)
    batch["prompts"] = batch.pop("prompt")
    batch["keys"] = [example["key"] for example in examples]
    batch["loss_weights"] = torch.tensor([key.loss_weight for key in batch["keys"]])
    return batch


# ============================== 4. Encoders: prompts to embeddings, pictures to latents ===============================


class PromptEmbeds(NamedTuple):
    """One prompt as FLUX.1 takes it, on the CPU; `default_collate` stacks several."""

    prompt_embeds: Tensor  # (T, D), from T5
    pooled_prompt_embeds: Tensor  # (P,), from CLIP
    clip_ids: Tensor  # (77,), for a CLIP that is trained


@torch.no_grad()
def encode_prompts(
    args: Namespace, accelerator: Accelerator, prompts: list[str], dtype: torch.dtype
) -> dict[str, PromptEmbeds]:
    """Encode each prompt, as the pipeline itself does for sampling, and free the encoders."""
    pipeline = from_base(FluxPipeline, args, vae=None, transformer=None, dtype=dtype).to(accelerator.device)
    limit = args.max_sequence_length
    cut = [prompt for prompt in prompts if len(pipeline.tokenizer_2(prompt).input_ids) > limit]
    if cut:
        logger.warning(f"--max_sequence_length={limit} cuts {len(cut)} prompts: {shorten(cut)}")
    encoded = {}
    for prompt in show_progress(prompts, "Encoding prompts"):
        embeds, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=limit)
        clip_ids = pipeline.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        encoded[prompt] = PromptEmbeds(embeds[0].cpu(), pooled[0].cpu(), clip_ids[0])
    return encoded


@torch.no_grad()
def embed_prompt(text_encoder: Any, embeds: PromptEmbeds) -> PromptEmbeds:
    """The prompt as a CLIP that is trained sees it now; unchanged if there is none."""
    if text_encoder is None:
        return embeds
    text_encoder = unwrap(text_encoder)  # DDP's forward would wait for the other processes
    was_training = text_encoder.training
    pooled = text_encoder.eval()(embeds.clip_ids[None].to(text_encoder.device)).pooler_output
    text_encoder.train(was_training)
    return embeds._replace(pooled_prompt_embeds=pooled[0].cpu())


def load_vae(args: Namespace, accelerator: Accelerator) -> AutoencoderKL:
    """The frozen VAE: bfloat16 in a bf16 run, else float32 (in float16 its activations overflow)."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    vae = from_base(AutoencoderKL, args, subfolder="vae", dtype=dtype)
    return vae.requires_grad_(False).eval().to(accelerator.device)


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """The posterior over latents of pixels (B, 3, 8H, 8W) in [-1, 1]: mean and deviation, (B, 2, C, H, W), float32."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return torch.stack([posterior.mean.float(), posterior.std.float()], dim=1)


def cache_latents(vae: AutoencoderKL, dataset: DreamBoothDataset) -> None:
    """Keep the posterior of every picture, each repeat with a crop of its own; each step still draws a sample."""
    cached: dict = {}
    for source, pictures in dataset.sources.items():
        for example, size in enumerate(show_progress(dataset.buckets, "Encoding pictures")):
            index = example % len(pictures)
            if (source, index, size) not in cached:
                loaded = dataset.load(source, index, size, epoch=0, position=index)
                loaded["posterior"] = encode_pixels(vae, loaded.pop("pixels")[None])[0].cpu()
                cached[source, index, size] = loaded
    dataset.cached = cached
    read_resized.cache_clear()  # from here on nothing reads pictures


# ===================================== 5. What is trained, and in which precision =====================================


def load_transformer(args: Namespace, accelerator: Accelerator, seed: int) -> FluxTransformer2DModel:
    """The frozen transformer in the precision of the run, with trainable adapters in float32."""
    transformer = load_base(args, PRECISIONS[accelerator.mixed_precision], accelerator.device)
    add_adapter(args, transformer, args.lora_layers or TRANSFORMER_TARGETS, accelerator, seed)
    move_base(args, transformer, accelerator.device)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def load_text_encoder(args: Namespace, accelerator: Accelerator, seed: int) -> CLIPTextModel:
    """CLIP, frozen, with trainable adapters in float32."""
    dtype = PRECISIONS[accelerator.mixed_precision]
    text_encoder = from_base(CLIPTextModel, args, subfolder="text_encoder", dtype=dtype).requires_grad_(False)
    add_adapter(args, text_encoder, TEXT_ENCODER_TARGETS, accelerator, seed)
    if args.gradient_checkpointing:
        text_encoder.activation_checkpointing_enable()
    return text_encoder.to(accelerator.device).train()


def add_adapter(args: Namespace, model: Any, targets: list[str], accelerator: Accelerator, seed: int) -> None:
    """Put a LoRA on the layers whose names end in one of `targets`, or the one of `--init_lora` on its own layers.

    Its weights are held in float32, so that small updates are not rounded away, and are multiplied in half precision
    under autocast. The frozen layers and norms run in the precision in which they were loaded, as in a pipeline:
    autocast around the whole model would pass float32 from layer to layer.
    """
    if args.init_lora:
        state, alphas, metadata = read_lora(args)
        load = getattr(FluxPipeline, f"load_lora_into_{component_name(model)}")
        load(dict(state), alphas, model, adapter_name="default", metadata=metadata)
        model.set_adapter("default")  # transformers has frozen it
        cast_training_params(model, torch.float32)
        set_adapters(model, state)  # once more: the loader has rounded them to the precision of the base
    else:
        torch.manual_seed(seed)  # peft draws A from the global generator; B is zero
        config = LoraConfig(
            r=args.rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, init_lora_weights="gaussian",
            target_modules=targets,
        )  # fmt: skip
        model.add_adapter(config)
        cast_training_params(model, torch.float32)
    dtype = PRECISIONS[accelerator.mixed_precision]
    if dtype == torch.float32:
        return
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # else peft casts its inputs to float32
            for linear in itertools.chain(module.lora_A.values(), module.lora_B.values()):
                autocast = torch.autocast(accelerator.device.type, dtype, cache_enabled=False)
                linear.forward = autocast(linear.forward)


# ============================================= 6. Optimizer and schedule ==============================================


def adam_settings(args: Namespace) -> dict:
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


OPTIMIZERS = {  # by what --optimizer takes, in any case: its class, and what that takes beside rate and weight decay
    "adamw": ("torch.optim.AdamW", lambda args: {**adam_settings(args), "fused": True}),
    "adamw8bit": ("bitsandbytes.optim.AdamW8bit", adam_settings),  # also --use_8bit_adam
    "adafactor": (  # the learning rate is what the user says
        "transformers.optimization.Adafactor", lambda _: {"scale_parameter": False, "relative_step": False}
    ),
    "prodigy": ("prodigyopt.Prodigy", lambda args: {
        **adam_settings(args), "beta3": args.prodigy_beta3, "decouple": args.prodigy_decouple,
        "use_bias_correction": args.prodigy_use_bias_correction, "safeguard_warmup": args.prodigy_safeguard_warmup,
    }),
}  # fmt: skip


def make_optimizer(args: Namespace, groups: list) -> torch.optim.Optimizer:
    """The optimizer that `--optimizer` names, of parameters with their rates and weight decays."""
    path, make_options = OPTIMIZERS[args.optimizer]
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)(groups, **make_options(args))


def parameter_groups(args: Namespace, transformer: nn.Module, text_encoder: nn.Module | None) -> list[dict]:
    """The trainable parameters with their learning rates and weight decays."""
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    groups = [{"params": parameters, "lr": args.learning_rate, "weight_decay": args.adam_weight_decay}]
    if text_encoder is not None:
        parameters = [parameter for parameter in text_encoder.parameters() if parameter.requires_grad]
        lr = args.learning_rate if args.optimizer == "prodigy" else args.text_encoder_lr  # Prodigy takes one
        groups.append({"params": parameters, "lr": lr, "weight_decay": args.adam_weight_decay_text_encoder})
    return groups


def make_lr_scheduler(args: Namespace, optimizer: torch.optim.Optimizer, step: int) -> Any:
    """The schedule that `--lr_scheduler` names, where it is after `step` steps: nothing of it needs to be saved."""
    steps = max(args.max_train_steps, args.lr_warmup_steps + 1)  # some divide by the steps after the warm-up
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, step_rules=args.lr_step_rules, num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=steps, num_cycles=args.lr_num_cycles, power=args.lr_power,
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # torch expects an optimizer step before each
        for _ in range(step):
            lr_scheduler.step()
    return lr_scheduler


# =================================================== 7. Validation ====================================================


def validate(run: Run) -> None:
    """What `--validation_loss` and `--validation_prompt` ask for, from the live model."""
    args, step = run.args, run.state.step
    if args.validation_loss:
        loss = validation_loss(run)
        logger.info(f"Validation loss at step {step}: {loss:.5f}")
        run.accelerator.log({"validation_loss": loss}, step=step)
    if args.validation_prompt and (step > 0 or args.validation_steps):
        draw_validation_pictures(run)


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """Mean training loss of the validation pictures at fixed sigmas and noise, which can be compared between runs."""
    transformer = unwrap(run.transformer).eval()
    losses = []
    for number, (prompt, latents, token_weights) in enumerate(run.data.validation):
        text = default_collate([embed_prompt(run.text_encoder, run.data.prompts[prompt])])
        for level in range(VALIDATION_SIGMAS):
            sigmas = torch.full((1,), (level + 0.5) / VALIDATION_SIGMAS)
            noise = draw_normal(latents.shape[1:], 0, "validation", [(number, level)])
            inputs = StepInputs(
                latents=latents, noise=noise, sigmas=sigmas, loss_weights=torch.ones(1), token_weights=token_weights,
                options=run.args, **text._asdict(),
            )  # fmt: skip
            losses.append(training_loss(transformer, inputs.to(run.accelerator.device))["loss"])
    transformer.train()
    return torch.stack(losses).mean().item()


def draw_validation_pictures(run: Run) -> None:
    """Draw pictures from the live model, into `output_dir/validation` and the trackers."""
    args, accelerator, data, step = run.args, run.accelerator, run.data, run.state.step
    pictures: list = []
    if accelerator.is_main_process:
        prompts = [embed_prompt(run.text_encoder, data.prompts[text]) for text in args.validation_prompt]
        transformer, vae = unwrap(run.transformer), data.vae.to(accelerator.device)
        for picture in draw_prompts(args, transformer, vae, prompts, run.state.seed):
            pictures.append(picture)
            if run.signals.asked():
                break  # `train` and `train_and_save` stop after saving
        transformer.train()
        if data.dataset.cached is not None:  # with cached latents only validation needs the VAE
            vae.to("cpu")
        folder = Path(args.output_dir) / "validation"
        folder.mkdir(exist_ok=True)
        for number, picture in enumerate(pictures):
            picture.save(folder / f"step_{step:06d}_{number}.png")
        log_pictures(accelerator, "validation", pictures, step)
    accelerator.wait_for_everyone()


def draw_prompts(
    args: Namespace, transformer: FluxTransformer2DModel, vae: AutoencoderKL, prompts: list[PromptEmbeds], seed: int
) -> Iterator[Image.Image]:
    """`--num_validation_images` pictures of each prompt, from the same noise every time."""
    pairs = list(itertools.product(prompts, range(args.num_validation_images)))
    return draw_pictures(
        args, transformer, vae, [prompt for prompt, _ in pairs],
        [generator_for(seed, "validation", number) for _, number in pairs], args.validation_resolution,
        guidance_scale=args.validation_guidance_scale, num_inference_steps=args.validation_num_inference_steps,
    )  # fmt: skip


@torch.no_grad()
def draw_pictures(
    args: Namespace, transformer: FluxTransformer2DModel, vae: AutoencoderKL, prompts: list[PromptEmbeds],
    generators: list, size: Size, batch_size: int = 1, **options: Any,
) -> Iterator[Image.Image]:  # fmt: skip
    """A picture of `size` for each prompt, from the noise of its generator; `options` are the pipeline's."""
    scheduler = from_base(FlowMatchEulerDiscreteScheduler, args, subfolder="scheduler")
    pipeline = FluxPipeline(scheduler, None, None, None, None, None, transformer.eval())
    pipeline.set_progress_bar_config(disable=True)
    for start in show_progress(range(0, len(prompts), batch_size), "Drawing pictures"):
        text = default_collate(prompts[start : start + batch_size])
        latents = pipeline(
            prompt_embeds=text.prompt_embeds.to(vae.device), width=size[0], height=size[1],
            pooled_prompt_embeds=text.pooled_prompt_embeds.to(vae.device),
            generator=generators[start : start + batch_size], output_type="latent", **options,
        ).images  # fmt: skip
        latents = FluxPipeline._unpack_latents(latents, height=size[1], width=size[0], vae_scale_factor=8)
        latents = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        for latent in latents:  # one by one: the VAE takes much memory
            pixels = vae.decode(latent[None]).sample.float()
            yield pipeline.image_processor.postprocess(pixels)[0]


# ============================== You can stop reading here: what follows is the plumbing. ==============================


class UsageError(ValueError):
    """Something that the user gave cannot work; exit code 2. The message says what, and the way out."""


# ============================================= 8. Flags and their checks ==============================================


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable:
    """The type of a flag: a finite number from `low` to `high`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse shows it
    return parse


def sides(text: str, separator: str = ",") -> list[int]:
    """Sides in pixels, each rounded down to a multiple of 16: the VAE and packing would drop the rest anyway."""
    pixels = [number(int, PIXELS_PER_TOKEN)(side) for side in text.split(separator)]
    whole = [side // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN for side in pixels]
    if whole != pixels:
        logger.warning(f"{text} becomes {whole}, multiples of {PIXELS_PER_TOKEN}")
    return whole


def bucket_sizes(text: str) -> str | list[Size]:
    """The value of `--aspect_ratio_buckets`: auto, or the sizes in 'height,width;height,width'."""
    if text == "auto":
        return text
    pairs = [sides(pair) for pair in text.split(";")]
    return [(width, height) for height, width in pairs]


def shift_setting(text: str) -> float | str:
    """The value of `--flow_shift`: dynamic, or a number above 0; none is 1."""
    if text == "dynamic":
        return text
    return 1.0 if text == "none" else number(float, 1e-6)(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], usage="%(prog)s [flags] [@file with flags]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, fromfile_prefix_chars="@",
    )  # fmt: skip
    parser.convert_arg_line_to_args = lambda arg_line: shlex.split(arg_line, comments=True)  # type: ignore[method-assign]

    def add(name: str, help: str, kind: Any = str, default: Any = None, **options: Any) -> None:
        """Declare a flag. Its kind is the type of its value, a list of what it may be, or bool for a switch."""
        if kind is bool:
            options["action"], default = "store_true", False
        elif isinstance(kind, list):
            options["choices"] = kind
        else:
            options["type"] = kind
        group.add_argument(name, default=default, help=help, **options)

    path = os.path.expanduser  # no shell has replaced the ~ in --flag=~/folder
    not_negative, below_one, count = number(float, 0), number(float, 0, 1 - 1e-9), number(int, 1)
    schedules, filters = [kind.value for kind in SchedulerType], [kind.name.lower() for kind in Image.Resampling]
    schemes = ["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"]
    # fmt: off
    group = parser.add_argument_group("model")
    add("--pretrained_model_name_or_path", "FLUX.1 on the Hub, or a diffusers folder", path, required=True)
    add("--revision", "branch, tag or commit of the checkpoint on the Hub")
    add("--variant", "variant of the weight files, for example fp16")
    add("--cache_dir", "where downloaded models and datasets are kept", path)
    group = parser.add_argument_group("pictures and captions")
    add("--instance_data_dir", "folder with the pictures of the subject", path)
    add("--dataset_name", "dataset instead: a Hub name or a folder", path)
    add("--dataset_config_name", "configuration of the dataset, if it has several")
    add("--image_column", "column of the dataset with the pictures", str, "image")
    add("--caption_column", "column of the dataset with the captions")
    add("--caption_extension", "caption files beside the pictures of the folder, for example .txt")
    add("--caption_dropout", "share of prompts to leave empty", below_one, 0.0)
    add("--instance_prompt", "prompt with a rare word for pictures without a caption")
    add("--trigger_word", "what {trigger} in prompts stands for; captions without it get it in front")
    add("--mask_data_dir", "folder of masks named like the pictures: white counts fully", path)
    add("--alpha_mask", "take each picture's own transparency as its mask", bool)
    add("--unmasked_weight", "weight of the loss where a mask is black", number(float, 0, 1), 0.1)
    add("--repeats", "how often each picture is seen in an epoch", count, 1)
    add("--resolution", "side in pixels; several (512,768): each that a picture is large enough for", sides, "512")
    add("--aspect_ratio_buckets", "crop to one of 'height,width;...', or auto", bucket_sizes)
    add("--center_crop", "crop the centre; else a new random crop each epoch", bool)
    add("--random_flip", "mirror half of the pictures, drawn anew each epoch", bool)
    add("--image_interpolation_mode", "resize filter", filters, "lanczos")
    add("--dataloader_num_workers", "processes that load pictures; 0: none", number(int, 0), 0)
    add("--cache_latents", "encode each picture once, with one crop, and free the VAE", bool)
    group = parser.add_argument_group("prior preservation")
    add("--with_prior_preservation", "train on pictures of the class as well", bool)
    add("--class_data_dir", "folder of class pictures; missing ones are generated", path)
    add("--class_prompt", "prompt of the class, for example 'a photo of a dog'")
    add("--num_class_images", "class pictures that there should be", count, 100)
    add("--prior_loss_weight", "weight of the prior's loss", not_negative, 1.0)
    add("--sample_batch_size", "class pictures generated at a time", count, 4)
    add("--prior_generation_precision", "precision of class pictures; without it bf16, on a CPU fp32", list(PRECISIONS))
    group = parser.add_argument_group("training")
    add("--train_text_encoder", "train CLIP too (T5 always stays frozen)", bool)
    add("--init_lora", "LoRA to start from: file, folder or Hub name", path)
    add("--train_batch_size", "pictures per process and micro-batch", count, 4)
    add("--gradient_accumulation_steps", "micro-batches per optimizer step", count, 1)
    add("--num_train_epochs", "passes over the pictures", count, 1)
    add("--max_train_steps", "optimizer steps; wins over --num_train_epochs", count)
    add("--seed", "makes the run repeatable; without it one is drawn, logged and kept", int)
    add("--local_rank", "set by launchers; the environment's value wins", int, -1)
    group = parser.add_argument_group("memory and speed")
    add("--gradient_checkpointing", "recompute activations to save memory", bool)
    add("--mixed_precision", "without it what `accelerate config` says", ["no", "fp16", "bf16"])
    add("--allow_tf32", "float32 products in TF32 on Ampere and newer", bool)
    add("--attention_backend", "name of it in diffusers; without it torch chooses")
    add("--enable_npu_flash_attention", "--attention_backend=_native_npu", bool)
    group = parser.add_argument_group("flow matching and prompts")
    add("--guidance_scale", "guidance input in training; give 1 for FLUX.1 [dev]", number(float), 3.5)
    add("--weighting_scheme", "how sigmas are drawn or weighted", schemes, "none")
    add("--flow_shift", "none, dynamic, or a number: above 1 more noise", shift_setting, "none")
    add("--logit_mean", "mean for --weighting_scheme=logit_normal", number(float), 0.0)
    add("--logit_std", "deviation for --weighting_scheme=logit_normal", number(float, 1e-6), 1.0)
    add("--mode_scale", "scale for --weighting_scheme=mode", number(float), 1.29)
    add("--max_sequence_length", "tokens of a prompt that T5 reads", number(int, 1, 512), TEXT_LENGTH)
    group = parser.add_argument_group("optimizer and schedule")
    add("--optimizer", ", ".join(OPTIMIZERS), str.lower, "AdamW", choices=list(OPTIMIZERS))
    add("--use_8bit_adam", "AdamW with 8-bit state", bool)
    add("--learning_rate", "learning rate of the transformer; 1 for prodigy", not_negative, 1e-4)
    add("--text_encoder_lr", "learning rate of CLIP; prodigy takes --learning_rate", not_negative, 5e-6)
    add("--scale_lr", "multiply the learning rate by processes x accumulation x batch size", bool)
    add("--lr_scheduler", "learning-rate schedule", schedules, "constant")
    add("--lr_warmup_steps", "warm-up, where the schedule has one", number(int, 0), 500)
    add("--lr_num_cycles", "restarts of cosine_with_restarts", count, 1)
    add("--lr_power", "power of the polynomial schedule", not_negative, 1.0)
    add("--lr_step_rules", "for piecewise_constant, factor:until step,...,factor: '1:100,0.1:300,0.01'")
    add("--adam_beta1", "decay of the gradient's mean", below_one, 0.9)
    add("--adam_beta2", "decay of the gradient's square", below_one, 0.999)
    add("--adam_weight_decay", "weight decay of the transformer", not_negative, 1e-4)
    add("--adam_weight_decay_text_encoder", "weight decay of CLIP", not_negative, 1e-3)
    add("--adam_epsilon", "added to the denominator of Adam's step", not_negative, 1e-8)
    add("--max_grad_norm", "norm that gradients are clipped to; 0: not clipped", not_negative, 1.0)
    add("--prodigy_beta3", "decay of Prodigy's estimate; without it sqrt(beta2)", below_one)
    add("--prodigy_decouple", "decoupled weight decay, as in AdamW", string_to_bool, True)
    add("--prodigy_use_bias_correction", "Adam's bias correction", string_to_bool, True)
    add("--prodigy_safeguard_warmup", "use with a learning-rate warm-up", string_to_bool, True)
    group = parser.add_argument_group("validation")
    add("--validation_prompt", "prompt of pictures; may be given several times", action="append")
    add("--num_validation_images", "pictures of each prompt each time", count, 4)
    add("--validation_epochs", "validate after the first epoch, then every so many epochs", count, 50)
    add("--validation_steps", "validate also at the start, and every so many steps", count)
    add("--validation_resolution", "side, or 1024x768; else that of the training", lambda text: sides(text, "x"))
    add("--validation_guidance_scale", "guidance scale of validation pictures", not_negative, 3.5)
    add("--validation_num_inference_steps", "sampling steps of the pictures", count, 28)
    add("--skip_final_inference", "draw no pictures from the saved result", bool)
    add("--validation_loss", "log the loss at fixed noise and sigmas as well", bool)
    add("--validation_data_dir", "held-out pictures for --validation_loss; without it those of the training", path)
    group = parser.add_argument_group("output, checkpoints and the Hub")
    add("--output_dir", "where everything is written", path, OUTPUT_DIR)
    add("--logging_dir", "folder of the trackers, inside --output_dir", str, "logs")
    add("--report_to", "tensorboard, wandb, all, none, ...", str, "tensorboard")
    add("--checkpointing_steps", "steps between two checkpoints", count, 500)
    add("--checkpoints_total_limit", "how many to keep; without it all", count)
    add("--resume_from_checkpoint", "latest, or a checkpoint's name or path", path)
    add("--upcast_before_saving", "save the result in float32", bool)
    add("--push_to_hub", "upload the result to the Hub; a new repository is public", bool)
    add("--hub_model_id", "repository; without it the name of --output_dir")
    add("--hub_token", "token; without it that of `hf auth login`", lambda text: text.strip() or None)
    group = parser.add_argument_group("of this script: adapters of a frozen base")
    add("--rank", "rank of the adapters", count, 4)
    add("--lora_alpha", "adapters are scaled by lora_alpha / rank; usually what --rank is", count, 4)
    add("--lora_dropout", "dropout in front of the adapters", below_one, 0.0)
    add("--lora_layers", "ends of the layers' names, with commas", lambda text: text.replace(",", " ").split())
    add("--prior_from_base_model", "a prior without class pictures: what the base predicts", bool)
    add("--prior_share", "share of the steps with this prior; divides its weight", float, 1.0, choices=[1, 0.5, 0.25])
    add("--class_word", "instead of --class_prompt: each picture's own, with this for --trigger_word")
    add("--base_quantization", "frozen weights in 8 or 4 bits", ["none", "int8", "nf4"], "none")
    add("--blocks_to_swap", "blocks whose frozen weights wait in host memory", number(int, 0), 0)
    # fmt: on
    return parser


def problems(args: Namespace) -> Iterator[str]:
    """Mistakes in the flags that would otherwise show only after hours, or after a model is loaded."""
    yield from picture_problems(args)
    yield from own_problems(args)
    if args.validation_data_dir and not args.validation_loss:
        yield "--validation_data_dir needs --validation_loss"
    if args.validation_steps and not (args.validation_prompt or args.validation_loss):
        yield "--validation_steps needs --validation_prompt or --validation_loss"
    if args.optimizer == "prodigy" and args.learning_rate < 0.1:
        yield f"--learning_rate={args.learning_rate} is too low for prodigy, which finds the step size itself: give 1"
    if args.lr_scheduler == "piecewise_constant" and not args.lr_step_rules:
        yield "--lr_scheduler=piecewise_constant needs --lr_step_rules, for example 1:100,0.1:300,0.01"
    if not re.fullmatch(r"(\d*\.?\d+:\d+,)*\d*\.?\d+", args.lr_step_rules or "1"):
        yield f"--lr_step_rules={args.lr_step_rules} is not factor:until step,...,factor, as 1:100,0.1:300,0.01 is"
    package = OPTIMIZERS[args.optimizer][0].partition(".")[0]
    if find_spec(package) is None:
        yield f"--optimizer={args.optimizer} needs the package {package}: pip install {package}"


def picture_problems(args: Namespace) -> Iterator[str]:
    """What is wrong with the flags of pictures, prompts and folders."""
    if bool(args.instance_data_dir) == bool(args.dataset_name):
        yield "give one of --instance_data_dir and --dataset_name"
    if not (args.instance_prompt or args.caption_extension or args.caption_column):
        yield "give --instance_prompt, --caption_extension or --caption_column"
    if args.caption_column and not args.dataset_name:
        yield "--caption_column needs --dataset_name, which may be a folder; beside it give --caption_extension"
    if args.mask_data_dir and (args.dataset_name or args.alpha_mask):
        yield "--mask_data_dir is for --instance_data_dir, without --alpha_mask"
    prompts = [args.instance_prompt, args.class_prompt, *args.validation_prompt]
    if any("{trigger}" in prompt for prompt in prompts):
        yield "{trigger} in a prompt needs --trigger_word"
    if args.with_prior_preservation and not (args.class_data_dir and args.class_prompt):
        yield "--with_prior_preservation needs --class_data_dir and --class_prompt"
    names = ["output_dir", "pretrained_model_name_or_path", "init_lora"]
    names += ["instance_data_dir", "class_data_dir", "validation_data_dir", "mask_data_dir"]
    folders = [os.path.realpath(getattr(args, name)) for name in names if getattr(args, name)]
    if not args.output_dir or len(set(folders)) < len(folders):
        yield f"give each of --{', --'.join(names)} a folder of its own"


def own_problems(args: Namespace) -> Iterator[str]:
    """What is wrong with the flags of this script alone."""
    if args.prior_from_base_model and args.with_prior_preservation:
        yield "give one of --prior_from_base_model and --with_prior_preservation"
    if args.prior_from_base_model and bool(args.class_prompt) == bool(args.class_word):
        yield "--prior_from_base_model needs one of --class_prompt and --class_word"
    if (args.class_word or args.prior_share < 1) and not args.prior_from_base_model:
        yield "--class_word and --prior_share need --prior_from_base_model"
    prompt = args.instance_prompt or args.trigger_word
    if args.class_word and not (args.trigger_word and args.trigger_word in prompt):
        yield "--class_word needs --trigger_word: write {trigger} into --instance_prompt"
    if args.init_lora and (args.lora_layers or args.lora_dropout):
        yield "--init_lora brings its own layers: leave out --lora_layers and --lora_dropout"
    if args.blocks_to_swap and not args.gradient_checkpointing:
        yield "--blocks_to_swap needs --gradient_checkpointing: without it the copies would stay"
    if args.base_quantization == "nf4" and find_spec("bitsandbytes") is None:
        yield "--base_quantization=nf4 needs the package bitsandbytes: pip install bitsandbytes"


def parse_args(argv: list | None = None) -> Namespace:
    """The command line as a namespace; exits with code 2 and every problem found, a line each, if it cannot work."""
    parser = make_parser()
    try:
        args = parser.parse_args(argv)
    except ValueError as error:  # of shlex
        parser.error(f"a file of flags: {error}; quote as in a shell")
    if args.use_8bit_adam and args.optimizer == "adamw":
        args.optimizer = "adamw8bit"
    if args.enable_npu_flash_attention:
        args.attention_backend = "_native_npu"
    size = args.validation_resolution or args.resolution[:1]
    args.validation_resolution = (size[0], size[-1])
    word = args.trigger_word or "{trigger}"
    args.instance_prompt = (args.instance_prompt or "").replace("{trigger}", word)
    args.class_prompt = (args.class_prompt or "").replace("{trigger}", word)
    args.validation_prompt = [text.replace("{trigger}", word) for text in args.validation_prompt or [] if text]
    if found := list(problems(args)):
        parser.error("\n  ".join(found))
    return args


def settings(args: Namespace) -> dict:
    """The flags as plain values of JSON, without the token: for trackers, checkpoints and the model card."""
    return json.loads(json.dumps({name: value for name, value in vars(args).items() if name != "hub_token"}))


# ================================= 9. Pictures: finding, checking and reporting them ==================================

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}


def list_picture_files(flag: str, folder: str) -> list[Path]:
    """The picture files in `folder`, the value of `flag`, by name, without hidden ones."""
    try:
        paths = sorted(Path(folder).iterdir())
    except OSError as error:
        raise UsageError(f"{flag}={folder} is not a folder that can be read: {error.strerror}") from error
    return [path for path in paths if path.suffix.lower() in PICTURE_SUFFIXES and path.name[0] != "."]


def shorten(names: list[str]) -> str:
    """The first names of a list, for a message."""
    return textwrap.shorten(", ".join(names), 400)


def word_pattern(word: str) -> re.Pattern:
    """Finds `word`, but not as a part of others: no "sks" in "desks"."""
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")


def pictures_in_folder(flag: str, folder: str, prompt: str, extension: str | None, masks: dict) -> list[Picture]:
    """The pictures of `folder`, the value of `flag`, each with the text of its caption file, or else with `prompt`."""
    files = list_picture_files(flag, folder)
    if not files:
        raise UsageError(f"{flag}={folder} has no picture files ({', '.join(sorted(PICTURE_SUFFIXES))})")
    pictures, used = [], set(files)
    for path in files:
        caption, caption_file = "", path.with_name(f"{path.stem}.{(extension or 'txt').lstrip('.')}")
        if extension and caption_file.is_file():
            used.add(caption_file)
            try:
                caption = caption_file.read_text(encoding="utf-8-sig").strip()
            except ValueError as error:
                raise UsageError(f"{caption_file} is not in UTF-8: save it in that ({error})") from error
        open_picture = functools.partial(Image.open, path)
        pictures.append(Picture(path.name, open_picture, (caption or prompt,), masks.get(path.stem)))
    unused = [path.name for path in sorted(Path(folder).iterdir()) if path not in used and path.name[0] != "."]
    if unused:
        logger.warning(f"{flag}={folder}: ignored files (--caption_extension reads captions): {shorten(unused)}")
    return pictures


def pictures_in_dataset(args: Namespace) -> list[Picture]:
    """The pictures of `--dataset_name`'s train split, each with its caption or the instance prompt."""
    from datasets import load_dataset  # optional: only this flag needs it

    try:
        dataset = load_dataset(
            args.dataset_name, args.dataset_config_name, split="train", cache_dir=args.cache_dir, token=args.hub_token
        )
    except Exception as error:  # the library raises many kinds; all of them mean that the name does not work
        raise UsageError(f"--dataset_name={args.dataset_name} does not load: {error}") from error
    for column in (args.image_column, args.caption_column or args.image_column):
        if column not in dataset.column_names:
            raise UsageError(f"the dataset has no column {column}, only {', '.join(dataset.column_names)}")
    captions = [""] * len(dataset)
    if args.caption_column:
        captions = [str(caption or "").strip() for caption in dataset[args.caption_column]]
    images = dataset[args.image_column]
    pictures = []
    for row, caption in enumerate(captions):
        open_picture = functools.partial(images.__getitem__, row)
        pictures.append(Picture(f"row {row}", open_picture, (caption or args.instance_prompt,)))
    return pictures


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Any picture as upright 8-bit RGB: EXIF orientation applied, 16 bits scaled to 8, transparency on `background`."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def with_trigger(args: Namespace, caption: str) -> str:
    """The caption with `--trigger_word` in the place of {trigger}, or in front where it is missing."""
    if "{trigger}" in caption and not args.trigger_word:
        raise ValueError("its caption has {trigger}, which needs --trigger_word")
    if not args.trigger_word or caption == args.instance_prompt:
        return caption
    caption = caption.replace("{trigger}", args.trigger_word)
    return caption if word_pattern(args.trigger_word).search(caption) else f"{args.trigger_word} {caption}"


def check_pictures(args: Namespace, pictures: list[Picture]) -> list[Picture]:
    """Decode every picture once, before anything expensive; returns them with sizes and final prompts."""
    checked, broken = [], []
    for picture in show_progress(pictures, "Checking pictures"):
        try:
            if args.alpha_mask:
                picture = replace(picture, mask="alpha")
            image, mask = picture.read()
            if abs(math.log(mask.width / mask.height * image.height / image.width)) > 0.01:
                raise ValueError(f"its mask has {mask.size} pixels, the picture {image.size}: other proportions")
            prompts = tuple(with_trigger(args, prompt) for prompt in picture.prompts)
            checked.append(replace(picture, prompts=prompts, size=image.size))
        except Exception as error:  # decoders raise what they like; all of it means that it cannot be read
            broken.append(f"{picture.name}: {error}")
    if broken:
        raise UsageError("pictures that cannot be used; mend, replace or remove them:\n  " + "\n  ".join(broken))
    return checked


def resized_size(width: int, height: int, size: Size) -> Size:
    """Width and height of a picture that was resized to cover `size`, its aspect kept."""
    if width * size[1] <= height * size[0]:
        return size[0], int(size[0] * height / width)
    return int(size[1] * width / height), size[1]


def nearest_size(size: Size, sizes: list[Size]) -> Size:
    """Which of `sizes` is nearest to `size` in log aspect ratio, and among equals in log area; all width, height."""

    def distance(other: Size) -> tuple:
        aspect = math.log(size[0] / size[1] / (other[0] / other[1]))
        return abs(aspect), abs(math.log(math.prod(size) / math.prod(other)))

    return min(sizes, key=distance)


def training_sizes(args: Namespace, resolution: int) -> list[Size]:
    """What pictures are cropped to at a resolution: a square, or `--aspect_ratio_buckets`."""
    if not args.aspect_ratio_buckets:
        return [(resolution, resolution)]
    if args.aspect_ratio_buckets != "auto":
        return args.aspect_ratio_buckets

    def whole(pixels: float) -> int:
        return max(1, round(pixels / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN

    roots = [math.sqrt(ratio) for ratio in ASPECT_RATIOS]
    wide = [(whole(resolution * root), whole(resolution / root)) for root in roots]  # all of about the same area
    return list(dict.fromkeys(wide + [(height, width) for width, height in wide]))


def list_pictures(args: Namespace) -> Pictures:
    """The pictures of the subject, and those held out, each with its prompt; a UsageError without any."""
    prompt, extension, masks, pictures = args.instance_prompt, args.caption_extension, {}, {}
    if args.mask_data_dir:
        masks = {path.stem: path for path in list_picture_files("--mask_data_dir", args.mask_data_dir)}
    if args.dataset_name:
        pictures["instance"] = pictures_in_dataset(args)
    for source, flag in (("instance", "instance_data_dir"), ("validation", "validation_data_dir")):
        if getattr(args, flag):
            pictures[source] = pictures_in_folder(f"--{flag}", getattr(args, flag), prompt, extension, masks)
    masked = [picture.mask for picture in itertools.chain.from_iterable(pictures.values()) if picture.mask]
    if len(masked) > len(set(masked)):
        raise UsageError("--mask_data_dir: two pictures, perhaps one of them held out, have the name of one mask")
    if unused := [path.name for path in masks.values() if path not in masked]:
        logger.warning(f"--mask_data_dir has masks without a picture: {shorten(unused)}")
    for source, part in pictures.items():
        if missing := [picture.name for picture in part if not picture.prompts[0]]:
            raise UsageError(f"pictures without a caption: give --instance_prompt for them: {shorten(missing)}")
        pictures[source] = check_pictures(args, part)
    return pictures


def prepare_class_pictures(args: Namespace, accelerator: Accelerator, seed: int) -> list[Picture]:
    """The pictures of the class. Missing ones are drawn first, each process drawing its share."""
    if not args.with_prior_preservation:
        return []
    folder = Path(args.class_data_dir)
    with contextlib.suppress(OSError):  # `list_picture_files` reports it
        folder.mkdir(parents=True, exist_ok=True)
    missing = max(0, args.num_class_images - len(list_picture_files("--class_data_dir", args.class_data_dir)))
    files = [folder / f"class_{number:05d}.png" for number in range(2 * args.num_class_images)]
    files = [path for path in files if not path.exists()][:missing]
    accelerator.wait_for_everyone()  # nobody writes before all have counted
    if files:
        with stage(accelerator, "Drawing class pictures"):
            draw_class_pictures(args, accelerator, files[accelerator.process_index :: accelerator.num_processes], seed)
        accelerator.wait_for_everyone()
    found = pictures_in_folder("--class_data_dir", args.class_data_dir, args.class_prompt, None, {})
    checked = check_pictures(args, found[: args.num_class_images])
    return [replace(picture, prompts=(args.class_prompt,)) for picture in checked]  # without the trigger word


def draw_class_pictures(args: Namespace, accelerator: Accelerator, files: list[Path], seed: int) -> None:
    """Draw a class picture for each of the files, at the training resolution."""
    device, side = accelerator.device, max(args.resolution)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if args.prior_generation_precision not in (None, "no"):
        dtype = PRECISIONS[args.prior_generation_precision]
    prompt = encode_prompts(args, accelerator, [args.class_prompt], dtype)[args.class_prompt]  # frees the encoders
    transformer, vae = load_base(args, dtype, device), load_vae(args, accelerator)
    move_base(args, transformer, device)
    prompts, generators = [prompt] * len(files), [generator_for(seed, "class picture", path.stem) for path in files]
    pictures = draw_pictures(args, transformer, vae, prompts, generators, (side, side), args.sample_batch_size)
    for path, picture in zip(files, pictures, strict=True):
        partial = path.with_name(f"{PARTIAL}{path.name}")  # a killed run leaves no half-written picture
        picture.save(partial)
        partial.replace(path)


# =================================== 10. Randomness, and the order of the examples ====================================


def generator_for(*key: str | int) -> torch.Generator:
    """A CPU generator seeded by hashing `key`: (seed, purpose, epoch or step, position).

    Everything random comes from here: no draw depends on another one, on the processes or on where a run was stopped.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_normal(shape: torch.Size, seed: int, purpose: str, draws: list[tuple]) -> Tensor:
    """Standard normal noise of `shape` for each of B draws: (B, *shape)."""
    return torch.stack([torch.randn(shape, generator=generator_for(seed, purpose, *draw)) for draw in draws])


class ExampleKey(NamedTuple):
    """An example and its place in the run; these and the seed determine all its random draws."""

    epoch: int
    position: int  # in the order of the epoch, over all processes
    example: int  # its number in the dataset
    loss_weight: float  # share of its loss in the step's: 1 / examples of the step, or 0 for a filler
    last: bool  # whether its micro-batch ends an optimizer step


@dataclass
class MicroBatches:
    """The micro-batches of one process from `first_step` to `last_step`, as lists of example keys.

    An epoch is a shuffle of all examples, cut into micro-batches. Each optimizer step takes the next processes x
    accumulation of them, the last step of an epoch those that remain. A process that gets none runs a filler of weight
    zero, because DDP waits for all. With one bucket, the examples of a step do not depend on how they are split.
    """

    buckets: list[Size]  # the size of each example
    batch_size: int
    accumulation: int
    process: int
    processes: int
    seed: int
    first_step: int
    last_step: int

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.cut_epoch(0)) / (self.accumulation * self.processes))

    def cut_epoch(self, epoch: int) -> list[list]:
        """All micro-batches of an epoch, of one bucket each, as position and example; the small ones come last."""
        order = torch.randperm(len(self.buckets), generator=generator_for(self.seed, "order", epoch)).tolist()
        full: list = []
        growing: dict = {}
        for example in order:
            bucket = self.buckets[example]
            growing.setdefault(bucket, []).append(example)
            if len(growing[bucket]) == self.batch_size:
                full.append(growing.pop(bucket))
        position = itertools.count()
        batches = full + list(growing.values())
        return [[(next(position), example) for example in batch] for batch in batches]

    def __iter__(self) -> Iterator[list]:
        per_step = self.accumulation * self.processes
        for step in range(self.first_step, self.last_step):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if step == self.first_step or step_in_epoch == 0:
                cut = self.cut_epoch(epoch)
            batches = cut[step_in_epoch * per_step : (step_in_epoch + 1) * per_step]
            loss_weight = 1 / sum(len(batch) for batch in batches)
            for first in range(0, len(batches), self.processes):
                last = first + self.processes >= len(batches)
                batch, weight = batches[first][:1], 0.0  # a filler
                if first + self.process < len(batches):
                    batch, weight = batches[first + self.process], loss_weight
                yield [ExampleKey(epoch, position, example, weight, last) for position, example in batch]


def make_schedule(
    args: Namespace, accelerator: Accelerator, dataset: DreamBoothDataset, state: RunState
) -> MicroBatches:
    """The micro-batches of this process. Changes `args`: sets `max_train_steps`, and applies `scale_lr`."""
    per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    schedule = MicroBatches(
        dataset.buckets, batch_size=args.train_batch_size, accumulation=args.gradient_accumulation_steps,
        process=accelerator.process_index, processes=accelerator.num_processes,
        seed=state.seed, first_step=state.step, last_step=args.max_train_steps or 0,
    )  # fmt: skip
    if args.max_train_steps is None:
        args.max_train_steps = schedule.last_step = args.num_train_epochs * schedule.steps_per_epoch
    if state.step > args.max_train_steps:
        raise UsageError(f"the checkpoint is at step {state.step}: raise --max_train_steps={args.max_train_steps}")
    if not args.lr_scheduler.endswith("constant") and args.lr_warmup_steps >= args.max_train_steps:
        logger.warning(f"--lr_warmup_steps={args.lr_warmup_steps}: the {args.max_train_steps} steps end in the warm-up")
    if args.scale_lr:
        args.learning_rate, args.scale_lr = args.learning_rate * per_step, False
    logger.info(
        f"{len(dataset)} examples, {per_step} a step, {schedule.steps_per_epoch} steps an epoch, "
        f"{args.max_train_steps} steps in all at a learning rate of {args.learning_rate:g}"
    )
    return schedule


# ================================= 11. Memory: loading, quantized and swapped weights =================================


def hub_options(args: Namespace) -> dict:
    """The keyword arguments of everything that is loaded of the base model."""
    options = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir, "token": args.hub_token}
    return {name: value for name, value in options.items() if value}


def from_base(kind: Any, args: Namespace, **options: Any) -> Any:
    """`kind.from_pretrained` of the base model, with `options` beside the Hub's; a UsageError if it does not load."""
    name = args.pretrained_model_name_or_path
    try:
        return kind.from_pretrained(name, **hub_options(args), **options)
    except (OSError, ValueError, ImportError) as error:
        part = options.get("subfolder", "the pipeline")
        raise UsageError(f"{part} of --pretrained_model_name_or_path={name} does not load: {error}") from error


def empty_transformer(args: Namespace) -> FluxTransformer2DModel:
    """The transformer without weights, on the meta device: only its config is read."""
    name = args.pretrained_model_name_or_path
    config = FluxTransformer2DModel.load_config(name, subfolder="transformer", **hub_options(args))
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(config)


def load_base(args: Namespace, dtype: torch.dtype, device: torch.device) -> FluxTransformer2DModel:
    """The frozen transformer in `dtype` or quantized; parts may be on the CPU until `move_base` moves them.

    It is read tensor by tensor: straight to the device, or block by block from the file's pages. The linear layers of
    the blocks are quantized. The modulation (AdaLN, 27 % of FLUX.1 [dev]) acts on one vector a picture and its errors
    reach every token: it stays at int8 even with nf4, for 1.5 GiB. The other layers are 0.5 % of the weights.
    """
    options: dict = {"subfolder": "transformer", "dtype": dtype}
    if args.base_quantization == "none" and not args.blocks_to_swap:
        options["device_map"] = {"": device}
    transformer = from_base(FluxTransformer2DModel, args, **options).requires_grad_(False)
    if args.base_quantization == "none":
        return transformer
    swapped = swapped_blocks(args, transformer)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for block in show_progress(blocks, "Quantizing"):
        for name, linear in list(block.named_modules()):
            if type(linear) is nn.Linear:
                kind = "int8" if name.startswith("norm") else args.base_quantization
                layer = QuantizedLinear(linear, kind, device)
                if block in swapped:
                    layer.weight.data = layer.weight.data.cpu()
                block.set_submodule(name, layer)
    return transformer


def swapped_blocks(args: Namespace, transformer: Any) -> list[nn.Module]:
    """As many blocks as `--blocks_to_swap` says, evenly spread."""
    blocks, count = [*transformer.transformer_blocks, *transformer.single_transformer_blocks], args.blocks_to_swap
    if count > len(blocks):
        raise UsageError(f"--blocks_to_swap={count} is too many: this transformer has {len(blocks)} blocks")
    return [blocks[number * len(blocks) // count] for number in range(count)]


def move_base(args: Namespace, transformer: FluxTransformer2DModel, device: torch.device) -> None:
    """Move the transformer to `device`, but for the frozen weights of `--blocks_to_swap` blocks."""
    for block in swapped_blocks(args, transformer):
        SwappedWeights(block, device)
    transformer.to(device)


class SwappedWeights:
    """Hooks of a block that keep its frozen weights in host memory, and copy them to `device` while it runs.

    Gradient checkpointing runs a block again in the backward pass, and what that saves keeps the copy until it is used.
    """

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self.device, self.host = device, []
        for module in block.modules():
            for name, weight in module.named_parameters(recurse=False):
                if not weight.requires_grad:
                    waiting = weight.data.cpu()
                    if device.type == "cuda":
                        waiting = waiting.pin_memory()  # copied at the full speed of the bus
                    self.host.append((module, name, waiting))
        block.register_forward_pre_hook(self.bring)
        block.register_forward_hook(self.take_away, always_call=True)  # recomputing ends early, by an exception
        self.take_away()

    def bring(self, *_: Any) -> None:
        for module, name, waiting in self.host:  # new parameters, as autograd may still hold the old
            copy = waiting.to(self.device, non_blocking=True)
            module._parameters[name] = nn.Parameter(copy, requires_grad=False)

    def take_away(self, *_: Any) -> None:
        for module, name, waiting in self.host:  # empty, so that `model.to` moves nothing
            empty = waiting.new_empty(0, device=self.device)
            module._parameters[name] = nn.Parameter(empty, requires_grad=False)


class QuantizedProduct(torch.autograd.Function):
    """x (..., in) @ weight.T (in, out) + bias for a frozen weight, of which only the packed form is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.state = state
        return nn.functional.linear(x, QuantizedProduct.unpack(weight, state, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return gradient @ QuantizedProduct.unpack(weight, ctx.state, gradient.dtype), None, None, None

    @staticmethod
    def unpack(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
        """The weight as (out, in) in `dtype`: int8 times its scales, (out, 1), or NF4 by its state."""
        if isinstance(state, Tensor):
            return weight * state.to(dtype)
        from bitsandbytes.functional import dequantize_4bit  # optional

        return dequantize_4bit(weight, state).to(dtype)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer on `device` in int8 (one scale an output row) or NF4 (https://arxiv.org/abs/2305.14314).

    Bytes a weight: 1 and 0.52. Relative error of a random normal weight: 0.01 and 0.09.
    """

    def __init__(self, linear: nn.Linear, kind: str, device: torch.device) -> None:
        nn.Module.__init__(self)  # `nn.Linear`'s would allocate the weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.state: Any
        weight = linear.weight.to(device)
        if kind == "nf4":
            import bitsandbytes as bnb  # optional

            packed, self.state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            self.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=self.state, bnb_quantized=True)
        else:
            scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            self.state = scale.bfloat16().float()  # so that `unpack` multiplies by the same scale in bf16
            packed = (weight.float() / self.state).round().clamp(-127, 127).to(torch.int8)
            self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return QuantizedProduct.apply(x, self.weight, self.state, self.bias)


# =============================== 12. What a run holds and prepares; devices and processes =============================


@dataclass
class RunState:
    """Progress of the run. With the weights and the optimizer's state, all that an exact resume needs."""

    step: int  # optimizer steps done
    seed: int
    seconds: float = 0.0  # that the steps took

    @classmethod
    def start(cls, args: Namespace, resumed: Path | None) -> RunState:
        """Where the run starts: at the checkpoint, or at step 0 with `--seed` or a seed that is drawn."""
        if resumed is not None:
            state = cls(**read_checkpoint(resumed)["state"])
            if args.seed not in (None, state.seed):
                logger.warning(f"--seed={args.seed} has no effect: the run goes on with the checkpoint's {state.seed}")
            return state
        drawn = accelerate.utils.broadcast_object_list([torch.seed() % 2**31])[0]
        seed = drawn if args.seed is None else args.seed
        logger.info(f"Seed: {seed}")
        return cls(0, seed)


@dataclass
class TrainingData:
    """Everything prepared before the transformer loads."""

    dataset: DreamBoothDataset
    prompts: dict[str, PromptEmbeds]
    vae: AutoencoderKL  # on the CPU with cached latents
    validation: list[tuple]  # prompt, latents, token weights for the validation loss
    scheduler: FlowMatchEulerDiscreteScheduler  # the table of sigmas, and the constants of --flow_shift=dynamic
    schedule: MicroBatches


@dataclass
class Run:
    """A training run: its flags and processes, what was prepared, its progress; what is trained, and what trains it."""

    args: Namespace
    accelerator: Accelerator
    data: TrainingData
    state: RunState
    signals: StopSignals
    transformer: Any  # this, CLIP and the optimizer wrapped by accelerate
    text_encoder: Any  # None if it is not trained
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any

    @property
    def models(self) -> list:
        return [model for model in (self.transformer, self.text_encoder) if model is not None]

    @functools.cached_property
    def parameters(self) -> list:
        return list(itertools.chain.from_iterable(group["params"] for group in self.optimizer.param_groups))

    def asked_to_stop(self) -> bool:
        """Whether a signal to any process asks to stop; called on all of them."""
        return any(gather_object([self.signals.asked()]))

    def stop(self, message: str) -> None:
        """End all processes after a signal, which any of them may have received; `message` says what is saved."""
        received = max(gather_object([self.signals.received]))
        logger.warning(f"Stopped by signal {received}; {message}")
        for tracker in self.accelerator.trackers:
            tracker.finish()
        raise SystemExit(128 + received)

    def check_finite(self, loss: float, grad_norm: Tensor) -> None:
        """Stop unless a loss and the norm of its gradient are numbers."""
        scaler, norm = self.accelerator.scaler, float(grad_norm)
        if scaler is not None:  # it skips infinite gradients and halves its scale of 2^16 until none is
            norm = math.nan if scaler.get_scale() < 2**-14 else 0.0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise SystemExit(
                f"the loss is {loss} at step {self.state.step}, its gradient's norm {norm}: go on with "
                "--resume_from_checkpoint=latest and a lower --learning_rate, or with --mixed_precision=bf16"
            )


def prepare_data(
    args: Namespace, accelerator: Accelerator, dataset: DreamBoothDataset, schedule: MicroBatches, pictures: Pictures
) -> TrainingData:
    """Encode prompts, and pictures if they are to be cached."""
    held_out = pictures.get("validation", pictures["instance"]) if args.validation_loss else []
    prompts = dataset.prompts + [picture.prompts[0] for picture in held_out] + args.validation_prompt
    if args.prior_from_base_model:
        prompts += [prior_prompt(args, prompt) for prompt in dataset.prompts]
    prompts = list(dict.fromkeys(prompts))
    with stage(accelerator, f"Encoding {len(prompts)} prompts"):
        encoded = encode_prompts(args, accelerator, prompts, PRECISIONS[accelerator.mixed_precision])
    with stage(accelerator, "Encoding the pictures"):
        vae = load_vae(args, accelerator)
        validation = []
        for picture in held_out:  # centre crop, mean of the posterior: nothing random
            size = nearest_size(picture.size, training_sizes(args, args.resolution[0]))
            loaded = default_collate([load_picture(picture, size, args)])
            mean = encode_pixels(vae, loaded["pixels"])[:, 0].cpu()
            latents = (mean - vae.config.shift_factor) * vae.config.scaling_factor
            validation.append((picture.prompts[0], latents, loaded.get("token_weights")))
        if args.cache_latents:
            cache_latents(vae, dataset)
            vae.to("cpu")
    scheduler = from_base(FlowMatchEulerDiscreteScheduler, args, subfolder="scheduler")
    return TrainingData(dataset, encoded, vae, validation, scheduler, schedule)


def make_accelerator(args: Namespace) -> Accelerator:
    """Devices, processes, precision and trackers, and how this script logs."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        raise UsageError("adapters are small, and only DDP trains them: use accelerate_configs/ddp.yaml")
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=f"{args.output_dir}/{args.logging_dir}",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # others wait while one draws
        )  # fmt: skip
    except (ValueError, ImportError) as error:
        raise UsageError(f"--mixed_precision={args.mixed_precision}, --report_to={args.report_to}: {error}") from error
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if args.report_to != "none" and not accelerator.log_with:
        raise UsageError(f"--report_to={args.report_to} is not installed: install it, or give none")
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    # cuDNN's backward pass, torch's first choice on an H100, gave NaN gradients at once (torch 2.11, cuDNN 9.19).
    torch.backends.cuda.enable_cudnn_sdp(False)  # `_native_cudnn` switches it on where it is asked for
    return accelerator


def prepare_training(args: Namespace, accelerator: Accelerator, data: TrainingData, state: RunState) -> Run:
    """Load what is trained, make its optimizer and schedule, and hand all of it to accelerate."""
    text_encoder = None
    adapter_seed = generator_for(state.seed, "adapters").initial_seed()
    transformer = load_transformer(args, accelerator, adapter_seed)
    if args.train_text_encoder:
        text_encoder = load_text_encoder(args, accelerator, adapter_seed)
    if args.attention_backend:
        transformer.set_attention_backend(args.attention_backend)
    dynamo = accelerator.state.dynamo_plugin
    if dynamo.backend != DynamoBackend.NO:  # block by block, in place: `prepare` would compile the whole
        torch._dynamo.config.recompile_limit = 256  # each size is compiled, for each kind of pass
        transformer.compile_repeated_blocks(**dynamo.to_kwargs())
        dynamo.backend = DynamoBackend.NO
    optimizer = make_optimizer(args, parameter_groups(args, transformer, text_encoder))
    lr_scheduler = make_lr_scheduler(args, optimizer, state.step)
    run = Run(args, accelerator, data, state, StopSignals(), transformer, text_encoder, optimizer, lr_scheduler)
    run.transformer, run.optimizer = accelerator.prepare(transformer, optimizer)
    if text_encoder is not None:
        run.text_encoder = accelerator.prepare(text_encoder)
    for model in run.models:  # remove accelerate's autocast around the whole model; `add_adapter` has its own
        vars(unwrap(model)).pop("forward", None)
    plain_forward = transformer.forward

    def forward(*given: Any, **named: Any) -> Any:
        try:
            return plain_forward(*given, **named)
        except torch._dynamo.exc.TorchDynamoException as error:  # which holds activations until the block ends
            logger.warning(f"Compiling failed, and the blocks go on uncompiled: {error}")
            torch.compiler.set_stance("force_eager")
        return plain_forward(*given, **named)

    transformer.forward = forward
    register_state_hooks(accelerator)
    return run


def sum_over_processes(sums: dict[str, Tensor]) -> dict[str, float]:
    """Scalars by name, summed over the processes, of which some may lack a name. Reading them waits for the device."""
    values = torch.stack(list(sums.values())).tolist()
    totals: Any = Counter()
    for part in gather_object([dict(zip(sums, values, strict=True))]):
        totals.update(part)  # adds
    return totals


def unwrap(model: nn.Module) -> Any:
    """The model under what accelerate put around it for processes."""
    return getattr(model, "module", model)


def component_name(model: nn.Module) -> str:
    """What a pipeline calls an unwrapped model: "transformer" or "text_encoder"."""
    return "transformer" if isinstance(model, FluxTransformer2DModel) else "text_encoder"


def check_model(args: Namespace) -> None:
    """Stop unless the base is a FLUX.1 pipeline that fits the flags; its weights are not read."""
    name = args.pretrained_model_name_or_path
    try:
        index = FluxPipeline.load_config(name, **hub_options(args))
        if index["_class_name"] != "FluxPipeline":
            raise ValueError(f"it is a {index['_class_name']}")
        transformer = empty_transformer(args)
    except Exception as error:  # the Hub's client has its own kinds
        gated = "FLUX.1 [dev] is gated on the Hub: accept its terms there, then `hf auth login`, or give --hub_token"
        raise UsageError(f"--pretrained_model_name_or_path={name} does not load: {error} ({gated})") from error
    if args.attention_backend:
        try:
            transformer.set_attention_backend(args.attention_backend)
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"--attention_backend={args.attention_backend} cannot be used: {error}") from error
    swapped_blocks(args, transformer)
    layers = [f".{name}" for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]
    for target in args.lora_layers or []:
        if not any(layer.endswith(f".{target}") for layer in layers):
            raise UsageError(f"--lora_layers: no linear layer's name ends in {target}")
    if args.init_lora:
        read_lora(args)
        logger.warning("--init_lora brings its layers, rank and alpha: --rank and --lora_alpha have no effect")


def read_lora(args: Namespace) -> tuple:
    """The layers of `--init_lora` in peft's names, its alphas and metadata; a UsageError if it does not load."""
    try:
        state, alphas, metadata = FluxPipeline.lora_state_dict(
            args.init_lora, cache_dir=args.cache_dir, token=args.hub_token, return_alphas=True,
            return_lora_metadata=True,
        )  # fmt: skip
        clip = {name: state.pop(name) for name in list(state) if name.startswith("text_encoder.")}
        if clip:  # a file of kohya's has the names of diffusers' first versions
            state.update(convert_state_dict_to_peft(convert_state_dict_to_diffusers(clip)))
    except Exception as error:  # each loader has its own kinds
        raise UsageError(f"--init_lora={args.init_lora} does not load: {error}") from error
    parts = {name.partition(".")[0] for name in state}
    trained = {"transformer", "text_encoder"} if args.train_text_encoder else {"transformer"}
    if parts != trained:
        raise UsageError(f"--init_lora={args.init_lora} has layers of {parts}, and this run trains {trained}")
    return state, alphas, metadata


def set_adapters(model: Any, state: dict) -> None:
    """Load an unwrapped model's part of `state`, the adapters of a file; a UsageError if they do not fit."""
    prefix = f"{component_name(model)}."
    adapters = {}
    for name, value in state.items():
        if name.startswith(prefix):
            adapters[name.removeprefix(prefix).removeprefix("text_model.")] = value
    result = set_peft_model_state_dict(model, adapters)
    wrong = [name for name in result.missing_keys if "lora" in name] + result.unexpected_keys
    if wrong:
        raise UsageError(f"the checkpoint or --init_lora has other layers than this run: {shorten(wrong)}")


def prepare_output(args: Namespace, accelerator: Accelerator, resumed: Path | None, state: RunState) -> tuple:
    """Create and lock the output folder, move an earlier run's files, create the Hub repository: (its name, lock)."""
    output = Path(args.output_dir)
    if not accelerator.is_main_process:
        return "", None
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".lock", timeout=0)
        lock.acquire()
    except OSError as error:  # filelock's Timeout is one, too
        raise UsageError(f"--output_dir={output} cannot be written, or another run writes to it: {error}") from error
    for leftover in output.glob(f"{PARTIAL}*"):  # of a run that was killed while it wrote
        shutil.rmtree(leftover)
    first_step, patterns = 0, [*RESULTS, "validation"]
    if resumed is not None and resumed.resolve().parent == output.resolve():
        first_step, patterns = state.step, []
    earlier = [path for step, path in list_checkpoints(output).items() if step > first_step]
    for pattern in patterns:
        earlier += output.glob(pattern)
    if earlier:
        number = 1
        while (output / f"earlier-{number}").exists():
            number += 1
        folder = output / f"earlier-{number}"
        folder.mkdir()
        for path in earlier:
            path.rename(folder / path.name)
        logger.warning(f"Moved what an earlier run left to {folder}: {shorten([path.name for path in earlier])}")
    repo_id = args.hub_model_id or output.resolve().name
    if args.push_to_hub:
        try:
            repo_id = HfApi(token=args.hub_token).create_repo(repo_id, exist_ok=True).repo_id
        except Exception as error:  # whatever it is, the push would fail after hours
            raise UsageError(f"--push_to_hub: the Hub refused {repo_id}: {error}; try `hf auth login`") from error
    return repo_id, lock


# ================================================== 13. Checkpoints ===================================================

STATE_FILE = "training_state.json"  # written last: a checkpoint folder without it is not whole
PARTIAL = ".partial-"  # begins the names of what is being written
FITTING_FLAGS = {"rank", "lora_layers", "init_lora", "train_text_encoder", "optimizer"}  # else the state does not fit
FREE_FLAGS = {  # a resumed run may change these without a warning
    "cache_dir", "checkpointing_steps", "checkpoints_total_limit", "dataloader_num_workers", "gradient_checkpointing",
    "hub_model_id", "logging_dir", "num_validation_images", "output_dir", "push_to_hub", "report_to", "seed",
    "resume_from_checkpoint", "skip_final_inference", "validation_epochs", "validation_prompt", "validation_steps",
}  # fmt: skip


def save_checkpoint(run: Run) -> None:
    """Write `checkpoint-<step>`, complete or not at all, then delete the oldest; called on all processes."""
    args, accelerator, state = run.args, run.accelerator, run.state
    output = Path(args.output_dir)
    partial = output / f"{PARTIAL}checkpoint-{state.step}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        paths = [path for path in partial.rglob("*") if path.is_file()]
        files = {path.relative_to(partial).as_posix(): path.stat().st_size for path in paths}
        content = {"state": vars(state), "args": settings(args), "files": files, "processes": accelerator.num_processes}
        (partial / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n")
        put_in_place(partial, output / f"checkpoint-{state.step}")
        logger.info(f"Saved checkpoint-{state.step}")
        if args.checkpoints_total_limit:
            for path in list(list_checkpoints(output).values())[: -args.checkpoints_total_limit]:
                doomed = path.rename(output / f"{PARTIAL}{path.name}")  # never a half-deleted checkpoint
                shutil.rmtree(doomed, ignore_errors=True)
    accelerator.wait_for_everyone()


def put_in_place(partial: Path, final: Path) -> None:
    """Give a file or folder its final name once all of it is on the disk."""

    def flush(path: Path) -> None:
        if path.is_file() or os.name != "nt":  # Windows flushes no folders
            descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    for path in [*partial.rglob("*"), partial]:
        if path.is_file():
            path.chmod(0o644)  # safetensors lets nobody else read
        flush(path)
    partial.replace(final)
    flush(final.parent)


def register_state_hooks(accelerator: Accelerator) -> None:
    """Make `save_state` write models in the formats that pipelines load, and `load_state` read them."""

    def save_hook(models: list, weights: list, folder: str) -> None:
        if accelerator.is_main_process:
            save_adapters(models, Path(folder))
        weights.clear()

    def load_hook(models: list, folder: str) -> None:
        while models:
            set_adapters(unwrap(models.pop()), load_file(Path(folder) / LORA_FILE))

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


def load_checkpoint(run: Run, folder: Path) -> None:
    """Take weights and optimizer state of a checkpoint; rates and other settings stay the flags'."""
    args, accelerator = run.args, run.accelerator
    _, optimizer_settings = OPTIMIZERS[args.optimizer]
    names = ["lr", "initial_lr", "weight_decay", *optimizer_settings(args)]
    kept = [{name: group[name] for name in names if name in group} for group in run.optimizer.param_groups]
    accelerator.load_state(str(folder), map_location="cpu")
    for group, values in zip(run.optimizer.param_groups, kept, strict=True):
        group.update(values)
    logger.info(f"Resuming from {folder} at step {run.state.step} of {args.max_train_steps}")
    before = read_checkpoint(folder)
    changes = changed_flags(args, before["args"], settings(args).keys() - FREE_FLAGS)
    if before["processes"] != accelerator.num_processes:
        changes.append(f"it had {before['processes']} processes: examples may come twice in this epoch")
    if changes:
        logger.warning(f"Differs from the run that wrote {folder.name}: {'; '.join(changes)}")


def changed_flags(args: Namespace, before: dict, names: Iterable[str]) -> list[str]:
    """Which of these flags differ from those of a checkpoint."""
    now = settings(args)
    changed = [name for name in sorted(names) if before.get(name) != now[name]]
    return [f"--{name} was {before.get(name)} and is {now[name]}" for name in changed]


def find_checkpoint(args: Namespace) -> Path | None:
    """The folder that `--resume_from_checkpoint` names, which is whole and fits, or None to start anew."""
    wanted, output = args.resume_from_checkpoint, Path(args.output_dir)
    if not wanted:
        return None
    candidates = [Path(wanted) if Path(wanted).exists() else output / Path(wanted).name]
    if wanted == "latest":
        candidates = list(reversed(list_checkpoints(output).values()))
    for folder in candidates:
        try:
            before = read_checkpoint(folder)["args"]
        except UsageError as error:
            logger.warning(f"Passing over a checkpoint: {error}")
            continue
        if changes := changed_flags(args, before, FITTING_FLAGS):
            raise UsageError(f"{folder} does not fit this run: {'; '.join(changes)}. Give them as they were")
        return folder
    if wanted != "latest":
        raise UsageError(f"--resume_from_checkpoint={wanted} is no whole checkpoint")
    logger.warning(f"--resume_from_checkpoint=latest: no whole checkpoint in {output}, so this run starts anew")
    return None


def read_checkpoint(folder: Path) -> dict:
    """The metadata of a checkpoint; a UsageError if a file that it lists is missing or has another size."""
    try:
        metadata = json.loads((folder / STATE_FILE).read_text())
        sizes = {name: (folder / name).stat().st_size for name in metadata["files"]}
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{folder} is no whole checkpoint: {error}") from error
    if sizes != metadata["files"]:
        raise UsageError(f"{folder} is no whole checkpoint: a file has another size")
    return metadata


def list_checkpoints(output_dir: Path) -> dict:
    """The checkpoints in `output_dir`, whole or not, by step, in order."""
    found = {}
    for path in output_dir.glob("checkpoint-*"):
        if name := re.fullmatch(r"checkpoint-([1-9]\d*)", path.name):
            found[int(name[1])] = path
    return dict(sorted(found.items()))


# ============================================ 14. Results, model card, Hub ============================================

LORA_FILE = "pytorch_lora_weights.safetensors"
RESULTS = ["README.md", LORA_FILE, "image_*.png"]  # what is pushed
METADATA = (  # fields of a LoraConfig that loading needs; older versions of peft refuse those that they do not know
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "use_dora", "lora_bias",
)  # fmt: skip


def save_result(run: Run) -> None:
    """Write `pytorch_lora_weights.safetensors`; called on all processes."""
    args, accelerator, output = run.args, run.accelerator, Path(run.args.output_dir)
    if accelerator.is_main_process:
        dtype = torch.float32 if args.upcast_before_saving else PRECISIONS[accelerator.mixed_precision]
        partial = output / f"{PARTIAL}result"
        save_adapters(run.models, partial, dtype)
        put_in_place(partial / LORA_FILE, output / LORA_FILE)
        partial.rmdir()


def save_adapters(models: list, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write all adapters with their metadata into one file.

    With a `dtype` the file is a result: B is multiplied by lora_alpha / rank, since most programs read no metadata.
    """
    parts: dict = {}
    for wrapped in models:
        model = unwrap(wrapped)
        name, config = component_name(model), model.peft_config["default"]
        layers = get_peft_model_state_dict(model, save_embedding_layers=False)
        metadata = {key: getattr(config, key) for key in METADATA}
        metadata["target_modules"] = sorted(config.target_modules)
        if dtype is not None:
            for key, value in layers.items():
                if ".lora_B" in key:
                    value = value * model.get_submodule(key.partition(".lora_B")[0]).scaling["default"]
                layers[key] = value.to(dtype)
            metadata.update(lora_alpha=config.r, alpha_pattern=config.rank_pattern, use_rslora=False)
        if name == "text_encoder":  # as transformers 4 and the other programs call CLIP's layers
            layers = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in layers.items()}
        parts[f"{name}_lora_layers"] = layers
        parts[f"{name}_lora_adapter_metadata"] = metadata
    FluxPipeline.save_lora_weights(folder, weight_name=LORA_FILE, **parts)


def draw_final_pictures(
    args: Namespace, accelerator: Accelerator, prompts: list[PromptEmbeds], state: RunState
) -> list[str]:
    """Draw pictures from what was saved, which proves the file; returns their names."""
    dtype = PRECISIONS[accelerator.mixed_precision]
    text_encoder: Any = None
    transformer = load_base(args, dtype, accelerator.device)
    if args.train_text_encoder:
        text_encoder = from_base(CLIPTextModel, args, subfolder="text_encoder", dtype=dtype).to(accelerator.device)
    pipeline = FluxPipeline(None, None, text_encoder, None, None, None, transformer)
    pipeline.load_lora_weights(args.output_dir, weight_name=LORA_FILE)
    move_base(args, transformer, accelerator.device)
    vae = load_vae(args, accelerator)
    prompts = [embed_prompt(text_encoder, prompt) for prompt in prompts]
    pictures = list(draw_prompts(args, transformer, vae, prompts, state.seed))
    names = [f"image_{number}.png" for number in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(Path(args.output_dir) / name)
    log_pictures(accelerator, "test", pictures, state.step)
    return names


def start_trackers(args: Namespace, accelerator: Accelerator) -> None:
    """Start what `--report_to` names; the token must not get into a log."""
    config = {name: str(value) for name, value in settings(args).items()}
    if args.hub_token:  # wandb and others upload the command line
        sys.argv = [word.replace(args.hub_token, "***") for word in sys.argv]
    try:
        accelerator.init_trackers(PROJECT, config=config)
    except Exception as error:  # each tracker has its own kinds
        raise UsageError(f"--report_to={args.report_to} does not start: {error}; give tensorboard or none") from error


def log_pictures(accelerator: Accelerator, name: str, pictures: list, step: int) -> None:
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.stack(pictures)}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: pictures}, step)


def write_model_card(args: Namespace, repo_id: str, images: list[str], state: RunState) -> None:
    """Write README.md for the Hub: gallery, trigger words, flags, licence. (The Hub itself shows how to load it.)"""
    base, trigger = args.pretrained_model_name_or_path, args.instance_prompt or args.trigger_word
    link = "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    licence: dict = {"license": "other", "license_name": "flux-1-dev-non-commercial-license", "license_link": link}
    if not empty_transformer(args).config.guidance_embeds:  # FLUX.1 [schnell]
        licence = {"license": "apache-2.0"}
    widget = []
    for number, name in enumerate(images):
        prompt = args.validation_prompt[number // args.num_validation_images]
        widget.append({"text": prompt, "output": {"url": name}})
    data = ModelCardData(
        base_model=None if Path(base).exists() else base, library_name="diffusers", pipeline_tag="text-to-image",
        instance_prompt=trigger, widget=widget, **licence,
        tags=["text-to-image", "diffusers", "diffusers-training", "flux", "flux-diffusers", "dreambooth", *TAGS],
    )  # fmt: skip
    flags, defaults = [], make_parser()
    for name, value in settings(args).items():
        if value != defaults.get_default(name) and not str(value).startswith("/"):  # leaves out absolute paths
            flags.append(f"    {name}: {value}")
    text = f"""---
{data.to_yaml()}
---

# {repo_id.split("/")[-1]}

A DreamBooth {KIND} of {Path(base).name}, trained for {state.step} steps with seed {state.seed}.

{"<Gallery />" if images else ""}

## Trigger words

    {trigger or "the words of the captions"}

## Settings that are not the defaults

{chr(10).join(flags)}

## Licence

{licence.get("license_link", licence["license"])}
"""
    (Path(args.output_dir) / "README.md").write_text(str(ModelCard(text)), encoding="utf-8")


def push_to_hub(args: Namespace, repo_id: str) -> None:
    """Upload the result, the card and its pictures: no checkpoints, no logs."""
    try:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=repo_id, folder_path=args.output_dir, allow_patterns=RESULTS, commit_message="End of training"
        )
    except Exception as error:  # whatever it is, the result must not be lost with it
        raise SystemExit(f"the upload to {repo_id} failed: {error}; the result is in {args.output_dir}") from error


# =========================================== 15. Signals, stages, progress ============================================

STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
LAUNCHER = os.getppid() if "ACCELERATE_DYNAMO_MODE" in os.environ else None  # which `accelerate launch` sets


class StopSignals:
    """Remembers a signal that asks to stop, so that the step can end and a checkpoint be written.

    SIGTERM, SIGINT, SIGUSR1 (a cluster's warning) and SIGHUP (a closed terminal) count, and so does a launcher that has
    gone away. A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.received = 0  # the number of the signal

    def __enter__(self) -> StopSignals:
        wanted = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self.previous = {number: signal.signal(number, self.remember) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def remember(self, received: int, _: object) -> None:
        if received == signal.SIGINT == self.received:
            os._exit(128 + received)
        self.received = received
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            os.write(2, b"\nStopping once this step is saved; a second ^C does not wait\n")

    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        if not self.received and self.launcher_is_gone():
            self.received = signal.SIGTERM
        return self.received != 0

    @staticmethod
    def ignore(_: int) -> None:
        """In the processes that load pictures: the training decides when they end."""
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)

    @staticmethod
    def launcher_is_gone() -> bool:
        """Whether the process that launched this one has ended; False without a launcher."""
        return LAUNCHER is not None and (os.getppid() != LAUNCHER or not psutil.pid_exists(LAUNCHER))


@contextlib.contextmanager
def stage(accelerator: Accelerator, name: str) -> Iterator[None]:
    """Announce a stage; when it ends, return freed memory to the device and log time and peak memory."""
    logger.info(name)
    accelerate.utils.memory.clear_device_cache(garbage_collection=True)  # for cycles of references
    has_cuda = accelerator.device.type == "cuda"
    if has_cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise SystemExit(
            f"out of memory while: {name} ({str(error).partition('.')[0]}); use less by --gradient_checkpointing, "
            "--cache_latents, --mixed_precision=bf16, --base_quantization=int8 or nf4, --blocks_to_swap=20, a smaller "
            "--resolution or --train_batch_size; tools/memory_plan.py says what fits"
        ) from error
    peak = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at most" if has_cuda else ""
    logger.info(f"{name}: {time.perf_counter() - start:.1f} s{peak}")


def show_progress(items: Iterable, name: str) -> Iterable:
    """The items, with a progress bar on the terminal of the main process; nothing where there is no terminal."""
    hidden = os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty()
    return tqdm(items, desc=name, leave=False, delay=2, disable=hidden)


if __name__ == "__main__":
    gc.freeze()  # the libraries' objects stay: each collection would spend 0.3 s on them
    try:
        main(parse_args())
    except UsageError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
