#!/usr/bin/env python
# Copyright 2026 The FLUX DreamBooth authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# ruff: noqa: E402

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<2.14",
#   "diffusers~=0.42.1",
#   "transformers~=5.23.0",
#   "accelerate~=1.15.0",
#   "peft~=0.21.2",
#   "huggingface_hub~=2.4.0",
#   "safetensors~=0.8.0",
#   "tokenizers~=0.23.3",
#   "numpy~=2.4.6",
#   "Pillow~=13.0",
#   "tqdm~=4.70",
#   "filelock~=4.2",
#   "psutil>=6,<8",
#   "xxhash>=3.5,<5",
#   "sentencepiece~=0.2.3",
#   "protobuf~=7.36.2",
#   "datasets~=5.2.0",
#   "bitsandbytes~=0.50.2",
#   "prodigyopt~=1.1.2",
#   "tensorboard~=2.21.0",
#   "wandb~=0.31.0",
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

Where to edit what:
    another crop, caption or file format   section 2, images and captions
    another loss or noise schedule         section 5, flow matching: `sample_sigmas`, `flow_matching_loss`
    which weights are trained              section 6, transformer: `load_transformer`
    another optimizer                      section 7, `library_optimizer`
    what is logged                         section 11, `train`
"""

import argparse
import atexit
import contextlib
import csv
import functools
import gc
import hashlib
import itertools
import json
import logging
import math
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
import unicodedata
import weakref
import zlib
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

for library in ("DIFFUSERS", "TRANSFORMERS"):  # they warn, as they are imported, of packages that are not needed
    os.environ.setdefault(f"{library}_VERBOSITY", "error")

import accelerate
import diffusers
import numpy as np
import psutil
import torch
import transformers
import xxhash
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    disable_fsdp_ram_efficient_loading,
    gather_object,
)
from accelerate.utils.memory import clear_device_cache
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import (
    EMAModel,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, ModelCard, ModelCardData, load_torch_model, save_torch_state_dict
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast
from transformers.hf_argparser import string_to_bool
from transformers.optimization import Adafactor

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".tga",
}  # fmt: skip
TEXT_SUFFIXES = {".txt", ".caption", ".json", ".jsonl", ".csv", ".md"}  # nobody misses them among the pictures
METADATA_FILES = ("metadata.jsonl", "metadata.csv")  # as the package datasets has them, with a column file_name
ASPECT_RATIOS = (1, 7 / 6, 4 / 3, 3 / 2, 7 / 4, 2, 5 / 2, 3)  # of automatic buckets, with their inverses
PIXELS_PER_TOKEN = 16  # the VAE shrinks by 8, packing by 2: a side must be a multiple of this
GIB = 1024**3
LAUNCHER = psutil.Process().parent() if "ACCELERATE_MIXED_PRECISION" in os.environ else None  # set by the launcher
VALIDATION_SIGMAS = 8  # noise levels of the validation loss
TOKENIZERS = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}
TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")  # whose versions a model card names
CURVE_FILE = "loss_curve.png"
LOG_SECONDS, SMOOTHED_STEPS = 30, 50  # between two lines in a log file; steps that a shown loss is the mean of
SHEET_FILE, SHEET_ROWS, SHEET_CELL = "contact_sheet.jpg", 32, 256  # of validation pictures: most rows, pixels of a cell
INTERPOLATIONS = ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
NO_BACKWARD = re.compile("sage|_flash_3$")  # attention back-ends that cannot train
ATTENTION_BACKENDS = [kind.value for kind in AttentionBackendName if not NO_BACKWARD.search(kind.value)]
PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCHEDULES = [kind.value for kind in SchedulerType]
WEIGHTING_SCHEMES = ["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"]
TRANSFORMER_FILES = "diffusion_pytorch_model{suffix}.safetensors"
SINGLE_FILE = "transformer_bf16.safetensors"
COMPONENTS = ["scheduler/", "text_encoder/", "text_encoder_2/", "tokenizer/", "tokenizer_2/", "transformer/", "vae/"]
ON_REQUEST = ["image_*.png", SINGLE_FILE]
RESULTS = ["README.md", CURVE_FILE, "model_index.json", *COMPONENTS, *ON_REQUEST]  # what is pushed, beside the sheet
KIND, TAGS, PROJECT = "full fine-tuning", ["full"], "dreambooth-flux"


class UsageError(ValueError):
    """Something that the user gave cannot work; exit code 2. The message says what, where, and the way out."""


class RunError(RuntimeError):
    """The run cannot go on; exit code 1. The message says why, what is kept, and the way out."""


# ======================================================================================================================
# 1. Arguments
# ======================================================================================================================


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: not None, not False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Ends with the message alone where a command is wrong: 90 lines of usage would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\nAll flags: {self.prog} --help\n")


class AddPrompt(argparse.Action):
    """A flag that may be given several times: once is a text, more often a list of texts."""

    def __call__(self, parser: Any, namespace: Namespace, value: Any, option_string: str | None = None) -> None:
        given = getattr(namespace, self.dest)
        earlier = given if isinstance(given, list) else [given] if given else []
        setattr(namespace, self.dest, [*earlier, value] if earlier else value)


def parse_flow_shift(text: str) -> float | str | None:
    """The value of `--flow_shift`: a number, "dynamic", or None for "none"."""
    with contextlib.suppress(ValueError):
        if text in ("none", "dynamic") or 0 < float(text) < math.inf:
            return {"none": None, "dynamic": text}[text] if text.isalpha() else float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither none nor dynamic nor a number above 0")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="FLUX.1 on the Hub, or a folder in diffusers' format")
    add("--revision", help="branch, tag or commit of the checkpoint on the Hub")
    add("--variant", help="variant of the weight files, for example fp16")
    add("--cache_dir", help="where downloaded models and datasets are kept")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pictures and captions", "give --instance_data_dir or --dataset_name").add_argument
    add("--instance_data_dir", help="folder with the pictures of the subject")
    add("--dataset_name", help="dataset with the pictures: a Hub name or a local folder")
    add("--dataset_config_name", help="configuration of the dataset, if it has several")
    add("--image_column", default="image", help="column of the dataset with the pictures")
    add("--caption_column", help="captions: column of the dataset, or of metadata.jsonl or .csv")
    add("--caption_extension", help="captions: files beside the pictures, for example .txt")
    add("--caption_dropout", type=float, default=0.0, help="share of prompts to leave empty")
    add("--instance_prompt", help="prompt with a rare word for pictures without a caption")
    add("--repeats", type=int, default=1, help="how often each picture is seen in an epoch")
    add("--resolution", type=int, default=512, help="side of the square in pixels, a multiple of 16")
    add("--aspect_ratio_buckets", help="crop to one of 'height,width;...', or auto")
    add("--center_crop", action="store_true", help="crop the centre; else a new random crop each epoch")
    add("--random_flip", action="store_true", help="mirror half of the pictures, drawn anew each epoch")
    add("--image_interpolation_mode", default="lanczos", choices=INTERPOLATIONS, help="resize filter")
    add("--dataloader_num_workers", type=int, default=0, help="processes that load pictures; 0: none")
    add("--cache_latents", action="store_true", help="encode each picture once, with one crop, and free the VAE")


def add_prior_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "prior preservation", "train on the model's own pictures of the class as well"
    ).add_argument
    add("--with_prior_preservation", action="store_true", help="train on class pictures as well")
    add("--class_data_dir", help="folder of class pictures; missing ones are generated")
    add("--class_prompt", help="prompt of the class, for example 'a photo of a dog'")
    add("--num_class_images", type=int, default=100, help="class pictures that there should be")
    add("--prior_loss_weight", type=float, default=1.0, help="weight of the class pictures' loss")
    add("--sample_batch_size", type=int, default=4, help="class pictures generated at a time")
    add("--prior_generation_precision", choices=list(PRECISIONS), help="(default: bf16 on an accelerator, else fp32)")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--train_text_encoder", action="store_true", help="train CLIP too (T5 always stays frozen)")
    add("--train_batch_size", type=int, default=4, help="pictures per process and micro-batch")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per optimizer step")
    add("--num_train_epochs", type=int, default=1, help="passes over the pictures")
    add("--max_train_steps", type=int, help="optimizer steps; wins over --num_train_epochs")
    add("--seed", type=int, help="makes the run repeatable (default: drawn, logged and kept)")
    add("--local_rank", type=int, default=-1, help="set by launchers; the environment's value wins")


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("memory and speed").add_argument
    add("--gradient_checkpointing", action="store_true", help="recompute activations to save memory")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="(default: what `accelerate config` says)")
    add("--allow_tf32", action="store_true", help="float32 products in TF32 on Ampere and newer")
    add("--attention_backend", choices=ATTENTION_BACKENDS, help="by diffusers' names (default: native)")
    add("--enable_npu_flash_attention", action="store_true", help="on an Ascend NPU (needs torch_npu)")
    add("--full_bf16", action="store_true", help="weights in bf16 alone, updates rounded stochastically")
    add(
        "--fused_backward_pass",
        action="store_true",
        help="update each weight as soon as it has its gradient, and free that; clips each tensor by itself",
    )


def add_flow_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("flow matching and prompts").add_argument
    add("--guidance_scale", type=float, default=3.5, help="guidance input in training")
    add("--weighting_scheme", default="none", choices=WEIGHTING_SCHEMES, help="how sigmas are drawn or losses weighted")
    add("--flow_shift", type=parse_flow_shift, help="towards noise: a number above 1, or dynamic")
    add("--logit_mean", type=float, default=0.0, help="mean for --weighting_scheme=logit_normal")
    add("--logit_std", type=float, default=1.0, help="deviation for --weighting_scheme=logit_normal")
    add("--mode_scale", type=float, default=1.29, help="scale for --weighting_scheme=mode")
    add("--max_sequence_length", type=int, default=77, help="tokens of a prompt that T5 reads")


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimizer and schedule").add_argument
    add("--optimizer", default="AdamW", help="AdamW, adafactor or prodigy")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state (bitsandbytes)")
    add("--learning_rate", type=float, default=1e-4, help="of the transformer; with prodigy use 1")
    add("--text_encoder_lr", type=float, default=5e-6, help="of CLIP; prodigy takes --learning_rate")
    add("--scale_lr", action="store_true", help="multiply by processes x accumulation x batch size")
    add("--lr_scheduler", default="constant", choices=SCHEDULES, help="schedule of the learning rate")
    add("--lr_warmup_steps", type=int, default=500, help="warm-up, where the schedule has one")
    add("--lr_num_cycles", type=int, default=1, help="restarts of cosine_with_restarts")
    add("--lr_power", type=float, default=1.0, help="power of polynomial")
    add("--lr_step_rules", help="piecewise_constant's: '1:100,0.1:300,0.01', factor:until step,...,factor")
    add("--adam_beta1", type=float, default=0.9, help="decay of the gradient's mean")
    add("--adam_beta2", type=float, default=0.999, help="decay of the gradient's square")
    add("--adam_weight_decay", type=float, default=1e-4, help="of the transformer")
    add("--adam_weight_decay_text_encoder", type=float, default=1e-3, help="of CLIP")
    add("--adam_epsilon", type=float, default=1e-8, help="added to the denominator")
    add("--max_grad_norm", type=float, default=1.0, help="clip gradients to it; 0: do not")
    add("--prodigy_beta3", type=float, help="decay of the estimate (default: sqrt(beta2))")
    add("--prodigy_decouple", type=string_to_bool, default=True, help="decoupled weight decay, as in AdamW")
    add("--prodigy_use_bias_correction", type=string_to_bool, default=True, help="Adam's bias correction")
    add("--prodigy_safeguard_warmup", type=string_to_bool, default=True, help="for a warm-up")
    add("--use_ema", action="store_true", help="average the weights; validation and the result use it")
    add("--ema_decay", type=float, default=0.99, help="about the last 1 / (1 - decay) steps count")


def add_validation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("validation").add_argument
    add("--validation_prompt", action=AddPrompt, help="of pictures drawn on the way; give it once or more")
    add("--num_validation_images", type=int, default=4, help="pictures of each prompt each time")
    add("--validation_epochs", type=int, default=50, help="after the first epoch, then every so many")
    add("--validation_steps", type=int, help="also before the first step, then every so many steps")
    add("--validation_guidance_scale", type=float, default=3.5, help="guidance of the pictures")
    add("--validation_num_inference_steps", type=int, default=28, help="sampling steps of the pictures")
    add("--skip_final_inference", action="store_true", help="draw no pictures from the saved result")
    add("--validation_loss", action="store_true", help="log the loss at fixed noise and sigmas as well")
    add("--validation_data_dir", help="held-out pictures for it (default: those of the training)")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output, checkpoints and the Hub").add_argument
    add("--output_dir", default="flux-dreambooth", help="where everything is written")
    add("--logging_dir", default="logs", help="of the trackers, inside --output_dir")
    add("--report_to", default="tensorboard", help="tensorboard, wandb, all, none, ...")
    add("--checkpointing_steps", type=int, default=500, help="steps between two checkpoints")
    add("--checkpoints_total_limit", type=int, help="how many checkpoints to keep (default: all)")
    add("--resume_from_checkpoint", help="latest, or a checkpoint's name or path")
    add("--upcast_before_saving", action="store_true", help="save the result in float32")
    add("--save_single_file", action="store_true", help="write the transformer into one file as well, in bf16")
    add("--push_to_hub", action="store_true", help="upload the result to the Hub")
    add("--hub_model_id", help="repository (default: the name of --output_dir)")
    add("--hub_token", help="token for the Hub (default: that of `hf auth login`)")


def make_parser() -> argparse.ArgumentParser:
    description = "\n".join((__doc__ or "").splitlines()[:1])
    parser = Parser(description=description, formatter_class=HelpFormatter)
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_prior_arguments(parser)
    add_training_arguments(parser)
    add_memory_arguments(parser)
    add_flow_arguments(parser)
    add_optimizer_arguments(parser)
    add_validation_arguments(parser)
    add_output_arguments(parser)
    return parser


def whole_tokens(pixels: float) -> int:
    """The nearest side that the transformer can take."""
    return max(1, round(pixels / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN


def range_problems(args: Namespace) -> Iterator[str]:
    """Numbers out of their range."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"--{name} is {value}; give a finite number"
    at_least = {
        "repeats": 1, "train_batch_size": 1, "gradient_accumulation_steps": 1, "num_train_epochs": 1,
        "max_train_steps": 1, "num_class_images": 1, "sample_batch_size": 1, "validation_epochs": 1,
        "num_validation_images": 1, "checkpointing_steps": 1, "checkpoints_total_limit": 1, "max_sequence_length": 1,
        "validation_steps": 1, "validation_guidance_scale": 0, "validation_num_inference_steps": 1,
        "dataloader_num_workers": 0, "lr_warmup_steps": 0, "lr_num_cycles": 1, "prior_loss_weight": 0,
        "learning_rate": 0, "text_encoder_lr": 0, "adam_weight_decay": 0, "adam_weight_decay_text_encoder": 0,
        "max_grad_norm": 0, "adam_epsilon": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and value < least:
            yield f"--{name} is {value}; give {least} or more"
    for name in ("adam_beta1", "adam_beta2", "prodigy_beta3", "ema_decay", "caption_dropout", "lora_dropout"):
        value = getattr(args, name, None)
        if value is not None and (value < 0 or value >= 1):
            yield f"--{name} is {value}; give a number from 0 to below 1"
    if args.max_sequence_length > 512:
        yield f"--max_sequence_length is {args.max_sequence_length}; FLUX.1 reads at most 512 tokens"
    if args.logit_std <= 0:
        yield f"--logit_std is {args.logit_std}; give a number above 0"
    if args.resolution < PIXELS_PER_TOKEN or args.resolution % PIXELS_PER_TOKEN:
        near = whole_tokens(args.resolution)
        yield f"--resolution is {args.resolution}; it must be a multiple of {PIXELS_PER_TOKEN}, {near} for example"


def data_contradictions(args: Namespace) -> Iterator[str]:
    """Flags on pictures and captions that do not go together, and flags that miss another."""
    if not args.instance_data_dir and not args.dataset_name:
        yield "no pictures: give --instance_data_dir FOLDER or --dataset_name NAME"
    if args.instance_data_dir and args.dataset_name:
        yield "--instance_data_dir and --dataset_name are both given; give one of them"
    if not (args.instance_prompt or args.caption_column or args.caption_extension):
        yield "no prompts: give --instance_prompt, or --caption_column or --caption_extension for captions"
    if args.caption_extension and (args.caption_column or args.dataset_name):
        yield "--caption_extension is for --instance_data_dir, without --caption_column; give one source of captions"
    if args.caption_extension and not re.fullmatch(r"\.\w+", args.caption_extension):
        yield f"--caption_extension is {args.caption_extension!r}; give the end of the files' names, such as .txt"
    needs = [
        ("validation_data_dir", "validation_loss"),
        ("with_prior_preservation", "class_data_dir"), ("with_prior_preservation", "class_prompt"),
    ]  # fmt: skip
    for name, other in needs:
        if getattr(args, name) and not getattr(args, other):
            yield f"--{name} needs --{other}: give it too, or leave --{name} out"
    buckets = args.aspect_ratio_buckets or "auto"
    whole = all(whole_tokens(int(side)) == int(side) for side in re.findall(r"\d+", buckets))
    if not whole or not re.fullmatch(r"auto|\d+,\d+(;\d+,\d+)*", buckets):
        wanted = f"auto, or height,width;height,width in multiples of {PIXELS_PER_TOKEN}"
        yield f"--aspect_ratio_buckets is {buckets!r}; give {wanted}"


def name_problems(args: Namespace) -> Iterator[str]:
    """Folders and prompts that cannot be what was meant."""
    if not args.output_dir.strip():
        yield "--output_dir is empty; give a folder"
    read = ("instance_data_dir", "validation_data_dir", "pretrained_model_name_or_path")
    written = ("output_dir", "class_data_dir")
    for name, other in [*itertools.product(written, read), written]:
        both = [os.path.realpath(getattr(args, at)) for at in (name, other) if getattr(args, at)]
        if len(both) == 2 and both[0] == both[1]:
            yield f"--{name} and --{other} are the same folder, {getattr(args, name)!r}; give each one of its own"
    for prompt in filter(None, (args.instance_prompt, args.class_prompt, *validation_prompts(args))):
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # how Python holds what it could not decode
            yield f"the prompt {prompt!r} is not in UTF-8; write it in that"


def contradictions(args: Namespace) -> Iterator[str]:
    """Flags that do not go together, and flags that miss another."""
    if args.validation_steps and not (validation_prompts(args) or args.validation_loss):
        yield "--validation_steps needs --validation_prompt or --validation_loss"
    if args.optimizer.lower() not in ("adamw", "adafactor", "prodigy"):
        yield f"--optimizer is {args.optimizer!r}; give AdamW, adafactor or prodigy"
    if args.lr_scheduler == "piecewise_constant" and not args.lr_step_rules:
        yield "--lr_scheduler=piecewise_constant needs --lr_step_rules, for example '1:100,0.1:300,0.01'"
    if args.lr_step_rules and not re.fullmatch(r"([\d.e-]+:\d+,)*[\d.e-]+", args.lr_step_rules):
        yield f"--lr_step_rules is {args.lr_step_rules!r}; give factor:step,...,factor, such as '1:100,0.1:300,0.01'"
    if args.hub_model_id and args.hub_model_id.count("/") > 1:
        yield f"--hub_model_id is {args.hub_model_id!r}; give NAME or OWNER/NAME"


def method_problems(args: Namespace) -> Iterator[str]:
    """Ways to train and to save memory that cannot work, or not together."""
    if args.full_bf16 and args.mixed_precision not in (None, "bf16"):
        yield f"--full_bf16 needs --mixed_precision=bf16, not {args.mixed_precision}"
    if args.fused_backward_pass and args.mixed_precision == "fp16":
        yield "--fused_backward_pass cannot scale losses as --mixed_precision=fp16 does; give bf16"
    if args.fused_backward_pass and args.gradient_accumulation_steps > 1:
        yield "--fused_backward_pass keeps no gradients to accumulate; give --gradient_accumulation_steps=1"
    if (args.full_bf16 or args.fused_backward_pass) and args.optimizer.lower() == "prodigy":
        yield "prodigy needs all gradients at once; with --full_bf16 and --fused_backward_pass give AdamW or adafactor"
    if args.attention_backend and args.enable_npu_flash_attention:
        yield "--enable_npu_flash_attention is --attention_backend=_native_npu; give one of them"


def missing_packages(args: Namespace) -> Iterator[str]:
    """Optional packages that a flag needs and that are not installed."""
    packages = {
        "bitsandbytes": args.use_8bit_adam and "--use_8bit_adam",
        "prodigyopt": args.optimizer.lower() == "prodigy" and "--optimizer=prodigy",
        "datasets": args.dataset_name and "--dataset_name",
        "torch_npu": args.enable_npu_flash_attention and "--enable_npu_flash_attention",
        "tensorboard": args.report_to == "tensorboard" and "--report_to=tensorboard",
        "wandb": args.report_to == "wandb" and "--report_to=wandb",
        "deepspeed": os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and "accelerate's configuration",
    }
    for package, flag in packages.items():
        if flag and find_spec(package) is None:
            yield f"{flag} needs the package {package}: pip install {package}, or leave the flag out"


def validate_args(args: Namespace) -> None:
    """Check what can be checked from the flags alone.

    Raises:
        UsageError: with every problem found, a line each.
    """
    problems = [*range_problems(args), *name_problems(args), *data_contradictions(args), *contradictions(args)]
    problems += [*method_problems(args), *missing_packages(args)]
    if problems:
        raise UsageError("\n  ".join(problems) if len(problems) == 1 else "\n  " + "\n  ".join(problems))


def notes_on_args(args: Namespace) -> Iterator[str]:
    """What works, but perhaps not as the user thinks."""
    prodigy = args.optimizer.lower() == "prodigy"
    if not args.with_prior_preservation and (args.class_data_dir or args.class_prompt):
        yield "--class_data_dir and --class_prompt have no effect without --with_prior_preservation"
    if args.use_8bit_adam and args.optimizer.lower() != "adamw":
        yield f"--use_8bit_adam has no effect with --optimizer={args.optimizer}"
    if prodigy and args.learning_rate <= 0.1:
        yield f"--learning_rate={args.learning_rate} is low for prodigy, which finds the step size itself: use 1"
    if prodigy and args.train_text_encoder:
        yield f"prodigy has one learning rate: CLIP is trained with --learning_rate={args.learning_rate} too"
    if args.cache_latents and (args.random_flip or not args.center_crop):
        yield "--cache_latents: each picture's crop and flip are drawn once, not anew each epoch"
    if args.dataset_name and not args.caption_column:
        yield "no --caption_column: every picture is trained with --instance_prompt"
    if args.aspect_ratio_buckets and args.with_prior_preservation:
        yield "--aspect_ratio_buckets: class pictures, drawn square, are cropped to their instance picture's bucket"
    unused = unused_captions(args)
    if unused:
        yield f"not used, for want of --caption_extension or --caption_column: {shorten(unused)}"


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line as a namespace; exits with code 2 and one message if it cannot work."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        validate_args(args)
    except UsageError as error:
        parser.error(str(error))
    return args


def validation_prompts(args: Namespace) -> list[str]:
    """The prompts of the validation pictures, however many there are."""
    given = args.validation_prompt
    return [prompt for prompt in (given if isinstance(given, list) else [given]) if prompt]


def hub_options(args: Namespace, **extra: Any) -> dict[str, Any]:
    """The keyword arguments of everything that is loaded of the base model."""
    options = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir, "token": args.hub_token}
    return {name: value for name, value in options.items() if value is not None} | extra


def from_base(kind: Any, args: Namespace, **options: Any) -> Any:
    """`kind.from_pretrained` of the base model, with `options` beside the Hub's; a UsageError if it does not load."""
    name = args.pretrained_model_name_or_path
    try:
        return kind.from_pretrained(name, **hub_options(args, **options))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # each loader has its own kinds
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UsageError(
            f"{options.get('subfolder', 'the pipeline')} of --pretrained_model_name_or_path={name} does not load: "
            f"{reason}. Check that the checkpoint is whole, --revision and --variant, and that what "
            "requirements_flux.txt names is installed"
        ) from error


# ======================================================================================================================
# 2. Images and captions (edit freely)
# ======================================================================================================================


def generator_for(*key: str | int) -> torch.Generator:
    """A CPU generator of its own for `key`, which names what is drawn: (seed, purpose, epoch or step, place).

    Everything random comes from here, so that no draw depends on another one, on the number of processes or on
    where a run was stopped.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class Picture:
    """One picture and its prompt, which no shuffle can part. `open` returns it as it is stored."""

    name: str
    open: Callable[[], Image.Image]
    prompt: str
    size: Size = (1, 1)  # upright; this and `look`, a difference hash, are found by `check_pictures`
    look: int = 0


def list_picture_files(folder: Path) -> list[Path]:
    """The picture files in `folder` by name; hidden files, folders and other files are passed over."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.suffix.lower() in PICTURE_SUFFIXES)


def shorten(names: list[str], most: int = 20) -> str:
    """The first names of a list for a message, and how many there are besides."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def open_folder(flag: str, folder: str) -> list[Path]:
    """The picture files in `folder`.

    Raises:
        UsageError: if `folder`, the value of `flag`, cannot be read.
    """
    try:
        return list_picture_files(Path(folder))
    except OSError as error:
        told = f"{flag} is {folder!r}, which is not a folder that can be read ({error.strerror})"
        raise UsageError(f"{told}; give the folder with the pictures") from error


def passed_over(folder: Path, extension: str | None) -> list[str]:
    """What somebody may miss in a folder of pictures and captions: other files, folders, links to nothing."""
    used, texts = set(list_picture_files(folder)), {*TEXT_SUFFIXES, extension}
    others = (path for path in folder.iterdir() if path not in used and path.suffix.lower() not in texts)
    return sorted(path.name for path in others if not path.name.startswith("."))


def unused_captions(args: Namespace) -> list[str]:
    """Files in `--instance_data_dir` that look like captions of its pictures, when no flag asks for captions."""
    folder = Path(args.instance_data_dir or "")
    if args.caption_column or args.caption_extension or not args.instance_data_dir:
        return []
    with contextlib.suppress(OSError):  # `list_pictures` will tell
        names = [*METADATA_FILES, *(path.with_suffix(".txt").name for path in list_picture_files(folder))]
        return [name for name in names if (folder / name).is_file()]
    return []


def same_name(name: str) -> str:
    """A file's name as metadata is compared with it: `./a.png` is `a.png`, and macOS writes accents apart."""
    return unicodedata.normalize("NFC", os.path.normpath(name))


def read_captions(files: list[Path], extension: str | None, column: str | None) -> dict[str, str]:
    """The captions of picture files of a folder, by `same_name` of the file: see `pictures_in_folder`.

    Raises:
        UsageError: naming the file that is not there or cannot be read.
    """
    captions: dict[str, Any] = {}
    source = files[0].parent
    try:
        if extension:
            for file in files:
                source = file.with_suffix(extension)
                text = source.read_text(encoding="utf-8-sig") if source.is_file() else None
                captions[same_name(file.name)] = text
        if column and any((source / name).is_file() for name in METADATA_FILES):
            jsonl = (source / METADATA_FILES[0]).is_file()
            source /= METADATA_FILES[not jsonl]
            with source.open(encoding="utf-8-sig", newline="") as table:
                rows = [json.loads(line) for line in table if line.strip()] if jsonl else list(csv.DictReader(table))
            captions = {same_name(row["file_name"]): row.get(column) for row in rows}
            if not any(column in row for row in rows):
                raise KeyError(column)
            if cut := [str(row["file_name"]) for row in rows if None in row]:
                raise ValueError(f"more cells than columns, so quote captions with commas, at {shorten(cut)}")
            if lost := sorted(captions.keys() - {same_name(file.name) for file in files}):
                logger.warning(f"{source} has captions of what is no picture in its folder: {shorten(lost)}")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        wanted = f"--caption_column={column} needs metadata.jsonl or metadata.csv with file_name and {column}"
        wanted = wanted if column else f"--caption_extension={extension} needs text"
        raise UsageError(f"{wanted}, in UTF-8; {source}: {type(error).__name__}: {error}") from error
    return {name: caption.strip() for name, caption in captions.items() if isinstance(caption, str)}


def pictures_in_folder(
    flag: str, folder: str, prompt: str, extension: str | None = None, column: str | None = None
) -> list[Picture]:
    """The pictures of a folder, each with its caption, or with `prompt` if it has none.

    Captions stand in a file of their own, named like the picture but for its `extension`, or in a `column` of the
    folder's metadata.jsonl or metadata.csv.

    Raises:
        UsageError: if `folder`, the value of `flag`, is missing or has no pictures, or some have no prompt at all.
    """
    files = open_folder(flag, folder)
    if not files:
        raise UsageError(f"{flag} is {folder!r}, which has no picture files ({', '.join(sorted(PICTURE_SUFFIXES))})")
    captions = read_captions(files, extension, column)
    missing = [path.name for path in files if not captions.get(same_name(path.name))]
    if missing and not prompt:
        told = f"{flag} is {folder!r}, where pictures have no caption in {extension or ' or '.join(METADATA_FILES)}"
        raise UsageError(f"{told}; write them, or give --instance_prompt for these: {shorten(missing)}")
    if missing and (extension or column):
        logger.warning(f"In {folder} {len(missing)} pictures take --instance_prompt for a caption: {shorten(missing)}")
    prompts = {path: captions.get(same_name(path.name)) or prompt for path in files}
    return [
        Picture(f"{path.parent.name}/{path.name}", functools.partial(Image.open, path), prompt)
        for path, prompt in prompts.items()
    ]


def open_row(dataset: Any, row: int, column: str) -> Image.Image:
    image = dataset[row][column]
    if image is None:
        raise ValueError("the row has no picture")
    return image


def pictures_in_dataset(args: Namespace) -> list[Picture]:
    """The pictures of `--dataset_name`'s train split, each with its caption or the instance prompt.

    Raises:
        UsageError: if a column is missing, holds no pictures, or a caption is not text.
    """
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
    captions = list(dataset[args.caption_column]) if args.caption_column else [None] * len(dataset)
    wrong = [str(row) for row, caption in enumerate(captions) if not isinstance(caption, str | None)]
    if wrong:
        raise UsageError(f"--caption_column is {args.caption_column!r}, which has no text in row {shorten(wrong)}")
    captions = [(caption or "").strip() for caption in captions]
    missing = [str(row) for row, caption in enumerate(captions) if not caption]
    if missing and not args.instance_prompt:
        told = f"--caption_column is {args.caption_column!r}, which has no text in row {shorten(missing)}"
        raise UsageError(f"{told}; write it, or give --instance_prompt for these")
    if missing and args.caption_column:
        logger.warning(f"{len(missing)} pictures take --instance_prompt for a caption: rows {shorten(missing)}")
    if len(dataset) == 0:
        raise UsageError(f"--dataset_name is {args.dataset_name!r}, whose train split is empty")
    images = dataset.select_columns(args.image_column)
    return [
        Picture(
            f"row {row}", functools.partial(open_row, images, row, args.image_column), caption or args.instance_prompt
        )
        for row, caption in enumerate(captions)
    ]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as upright 8-bit RGB: EXIF orientation applied, 16 bits scaled to 8, transparency on white."""
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
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 places is brighter than its left neighbour; near duplicates differ in few."""
    grey = np.asarray(image.resize((9, 8), Image.Resampling.BOX).convert("L"))
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes())


def check_pictures(pictures: list[Picture]) -> list[Picture]:
    """Decode every picture once, before anything expensive; returns them with their sizes and looks.

    Raises:
        UsageError: naming all that cannot be read.
    """
    checked, broken = [], []
    for picture in tqdm(pictures, desc="Checking pictures", unit="picture", leave=False, delay=2, disable=None):
        try:
            with picture.open() as stored:
                image = to_rgb(stored)
            checked.append(replace(picture, size=image.size, look=difference_hash(image)))
        except Exception as error:  # decoders raise what they like; all of it means that it cannot be read
            broken.append(f"{picture.name}: {error}")
    if broken:
        raise UsageError("pictures that cannot be read; replace or remove them:\n  " + "\n  ".join(broken))
    return checked


class View(NamedTuple):
    """What of a picture is trained on: the crop's corner after resizing, in pixels, and whether it is mirrored."""

    left: int
    top: int
    flip: bool


def nearest_size(size: Size, sizes: list[Size]) -> Size:
    """Which of `sizes` is nearest to `size` in log aspect ratio, and among equals in log area; all width, height."""
    aspect, area = size[0] / size[1], math.prod(size)
    return min(sizes, key=lambda at: (abs(math.log(aspect / (at[0] / at[1]))), abs(math.log(area / math.prod(at)))))


def training_sizes(args: Namespace) -> list[Size]:
    """What pictures are cropped to: the square of `--resolution`, or the sizes of `--aspect_ratio_buckets`."""
    if not args.aspect_ratio_buckets:
        return [(args.resolution, args.resolution)]
    if args.aspect_ratio_buckets == "auto":
        roots = [math.sqrt(ratio) for ratio in ASPECT_RATIOS]
        wide = [(whole_tokens(args.resolution * root), whole_tokens(args.resolution / root)) for root in roots]
        return list(dict.fromkeys([*wide, *((width, height) for height, width in wide)]))
    pairs = (pair.split(",") for pair in args.aspect_ratio_buckets.split(";"))
    return [(int(width), int(height)) for height, width in pairs]


def resized_size(width: int, height: int, size: Size) -> Size:
    """Width and height of a picture that was resized to cover `size`, its aspect kept."""
    if width * size[1] <= height * size[0]:
        return size[0], int(size[0] * height / width)
    return int(size[1] * width / height), size[1]


def draw_view(
    width: int, height: int, size: Size, center_crop: bool, random_flip: bool, generator: torch.Generator
) -> View:
    """Choose the crop to `size` of a resized picture of `width` x `height`, and whether to mirror it."""
    spare = (width - size[0], height - size[1])
    if center_crop:
        left, top = (round(side / 2) for side in spare)
    else:
        left, top = (int(torch.randint(side + 1, (), generator=generator)) for side in spare)
    return View(left, top, random_flip and bool(torch.rand((), generator=generator) < 0.5))


def to_pixels(image: Image.Image, size: Size, view: View, mode: str) -> Tensor:
    """Resize, crop and mirror an RGB picture to `size`, width and height: (3, height, width), float32 in [-1, 1]."""
    resample = Image.Resampling[mode.upper()]
    image = image.resize(resized_size(*image.size, size), resample)
    image = image.crop((view.left, view.top, view.left + size[0], view.top + size[1]))
    if view.flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)


def see(args: Namespace, picture: Picture, size: Size, generator: torch.Generator | None) -> tuple[View, Tensor]:
    """What of a picture is trained at `size`, and its pixels. Without a generator: the centre, not mirrored."""
    with picture.open() as stored:
        image = to_rgb(stored)
    center_crop, random_flip = args.center_crop or generator is None, args.random_flip and generator is not None
    resized = resized_size(*image.size, size)
    view = draw_view(*resized, size, center_crop, random_flip, generator or torch.Generator())
    return view, to_pixels(image, size, view, args.image_interpolation_mode)


def report_pictures(half: str, pictures: list[Picture], sizes: list[Size]) -> None:
    """Log what there is of a half, how much of it a crop to the nearest of `sizes` loses, and what looks wrong."""
    places: dict[Size, list[tuple[float, str]]] = {}
    enlarged, alike = [], []
    for number, picture in enumerate(pictures):
        size = nearest_size(picture.size, sizes)
        width, height = resized_size(*picture.size, size)
        places.setdefault(size, []).append((100 - 100 * math.prod(size) / (width * height), picture.name))
        if width > picture.size[0]:
            enlarged.append("{} ({}x{})".format(picture.name, *picture.size))
        twins = (other for other in pictures[:number] if (picture.look ^ other.look).bit_count() <= 6)
        alike += [f"{other.name} = {picture.name}" for other in twins]
    rows = [f"{len(pictures)} {half} pictures"]
    for (width, height), found in sorted(places.items()):
        mean = sum(share for share, _ in found) / len(found)
        names = shorten([f"{name} {share:.1f} %" for share, name in sorted(found)[::-1]])
        rows.append(f"{width}x{height}: {len(found)}, cropped by {mean:.1f} %: {names}")
    rows += [f"enlarged: {shorten(enlarged)}"] if enlarged else []
    rows += [f"near duplicates: {shorten(alike)}"] if alike else []
    logger.info("\n  ".join(rows))


class LatentDistribution(NamedTuple):
    """What the VAE makes of pixels: mean and standard deviation, each (..., C, H, W), float32, before scaling."""

    mean: Tensor
    std: Tensor


class ExampleKey(NamedTuple):
    """Which example is trained, and where in the run: all that its random draws depend on, with the seed."""

    epoch: int
    position: int  # in the order of the epoch, over all processes
    example: int  # its number in the dataset
    weight: float  # share of its loss in the step's: 1 / examples of the step, or 0 for a filler
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
            weight = 1 / sum(map(len, batches))
            for first in range(0, len(batches), self.processes):
                last, own = first + self.processes >= len(batches), first + self.process
                if own < len(batches):
                    yield [ExampleKey(epoch, *place, weight, last) for place in batches[own]]
                else:
                    yield [ExampleKey(epoch, *batches[first][0], 0.0, last)]


class DreamBoothDataset(Dataset):
    """Instance pictures, repeated, each paired with a class picture where there are any, as `args` say."""

    def __init__(
        self, instance_pictures: list[Picture], class_pictures: list[Picture], args: Namespace, seed: int
    ) -> None:
        instance, sizes = [picture for picture in instance_pictures for _ in range(args.repeats)], training_sizes(args)
        self.halves = {"instance": instance} | ({"class": class_pictures} if class_pictures else {})
        self.args, self.seed = args, seed
        # Of each example: that of its instance picture, which the class picture is cropped to as well.
        self.buckets = [nearest_size(instance[at % len(instance)].size, sizes) for at in range(len(self))]
        self.cached: dict[tuple[str, int, Size], LatentDistribution] | None = None  # by half, index in it and bucket

    def __len__(self) -> int:
        return max(len(pictures) for pictures in self.halves.values())

    @property
    def prompts(self) -> list[str]:
        """Every prompt that a batch may have, once."""
        prompts = [picture.prompt for pictures in self.halves.values() for picture in pictures]
        return list(dict.fromkeys(prompts + ([""] if self.args.caption_dropout else [])))

    def view_and_pixels(self, half: str, index: int, size: Size, *place: int) -> tuple[View, Tensor]:
        """The crop of a picture to `size` that is drawn for `place`, and its pixels."""
        return see(self.args, self.halves[half][index], size, generator_for(self.seed, "view", half, *place))

    def __getitem__(self, key: ExampleKey) -> dict[str, Any]:
        example: dict[str, Any] = {"key": key}
        size, drawn = self.buckets[key.example], generator_for(self.seed, "caption dropout", key.epoch, key.position)
        dropped = {"instance"} if torch.rand((), generator=drawn) < self.args.caption_dropout else set()
        for half, pictures in self.halves.items():
            index = key.example % len(pictures)
            example[half] = {"prompt": "" if half in dropped else pictures[index].prompt}
            if self.cached is None:
                example[half]["pixels"] = self.view_and_pixels(half, index, size, key.epoch, key.position)[1]
            else:
                example[half]["latents"] = self.cached[half, index, size]
        return example


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """B examples as one batch of B pictures, or of 2B: all instance pictures, then all class pictures.

    Returns:
        "keys": list of B; "weights": (B,); "prompts": list of B or 2B;
        "pixels": (B or 2B, 3, H, W), or "latents": a LatentDistribution of (B or 2B, C, h, w) each.
    """
    halves = [half for half in ("instance", "class") if half in examples[0]]
    pictures = default_collate([example[half] for half in halves for example in examples])
    keys = [example["key"] for example in examples]
    weights = torch.tensor([key.weight for key in keys])
    return {"keys": keys, "weights": weights, "prompts": pictures.pop("prompt")} | pictures


# ======================================================================================================================
# 3. Text encoders
# ======================================================================================================================


class PromptEmbeds(NamedTuple):
    """One prompt as FLUX.1 takes it, on the CPU."""

    prompt_embeds: Tensor  # (T, D), from T5
    pooled_prompt_embeds: Tensor  # (P,), from CLIP
    clip_ids: Tensor  # (77,), for a CLIP that is trained


def gather_dicts(mine: dict[Any, Any]) -> dict[Any, Any]:
    """The union of the dictionaries of all processes, on all of them."""
    return {key: value for part in gather_object([mine]) for key, value in part.items()}


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
    parts = {name: from_base(kind, args, subfolder=name) for name, kind in TOKENIZERS.items()}
    parts |= {name: from_base(kind, args, subfolder=name, dtype=dtype) for name, kind in TEXT_ENCODERS.items()}
    pipeline = FluxPipeline(scheduler=None, vae=None, transformer=None, **parts).to(accelerator.device)
    lengths = {"CLIP": (pipeline.tokenizer, pipeline.tokenizer.model_max_length)}
    lengths["T5 (--max_sequence_length)"] = (pipeline.tokenizer_2, args.max_sequence_length)
    for reader, (tokenizer, most) in lengths.items():
        cut = [repr(prompt[:60]) for prompt in prompts if len(tokenizer(prompt).input_ids) > most]
        if cut:
            logger.info(f"{len(cut)} prompts are cut: {reader} reads {most} tokens of {shorten(cut, 5)}")
    encoded = {}
    for prompt in tqdm(
        mine, desc="Encoding prompts", leave=False, delay=2, disable=not accelerator.is_main_process or None
    ):
        embeds, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=args.max_sequence_length)
        clip_ids = pipeline.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        encoded[prompt] = PromptEmbeds(embeds[0].cpu(), pooled[0].cpu(), clip_ids[0])
    return gather_dicts(encoded)


def pool_with_clip(text_encoder: nn.Module, clip_ids: Tensor) -> Tensor:
    """CLIP's pooled vector, (B, P), of token ids (B, 77)."""
    return text_encoder(clip_ids).pooler_output


# ======================================================================================================================
# 4. VAE
# ======================================================================================================================


def load_vae(args: Namespace, accelerator: Accelerator) -> AutoencoderKL:
    """The frozen VAE: bfloat16 in a bf16 run, else float32 (in float16 its activations overflow)."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    vae = from_base(AutoencoderKL, args, subfolder="vae", dtype=dtype)
    return vae.requires_grad_(False).eval().to(accelerator.device)


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: Tensor) -> LatentDistribution:
    """The posterior over latents of pixels (B, 3, 8H, 8W) in [-1, 1]: mean and deviation, (B, C, H, W)."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return LatentDistribution(posterior.mean.float(), posterior.std.float())


def sample_latents(
    distribution: LatentDistribution, noise: Tensor, shift_factor: float, scaling_factor: float
) -> Tensor:
    """A draw from the posterior, scaled as the transformer wants it: (B, C, H, W)."""
    sample = distribution.mean + distribution.std * noise
    return (sample - shift_factor) * scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, packed_latents: Tensor, side: int) -> Image.Image:
    """The picture, `side` pixels square, of packed latents (1, L, 4C)."""
    latents = FluxPipeline._unpack_latents(packed_latents, side, side, vae_scale_factor=8)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    pixels = vae.decode(latents.to(vae.device, vae.dtype)).sample[0].float().cpu()
    return Image.fromarray(((pixels / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy())


def cache_latents(accelerator: Accelerator, vae: AutoencoderKL, dataset: DreamBoothDataset) -> None:
    """Encode every picture of the dataset once, the processes sharing the work.

    What is kept is the posterior, so that each step still draws a sample of its own. Repeats of a picture get crops
    and flips of their own; where they come out the same, they are encoded once.
    """
    examples = list(enumerate(dataset.buckets))
    needed = ((half, at % len(part), size) for half, part in dataset.halves.items() for at, size in examples)
    mine, seen = list(dict.fromkeys(needed))[accelerator.process_index :: accelerator.num_processes], {}
    encoded: dict[tuple[str, int, Size], LatentDistribution] = {}
    bar = tqdm(mine, desc="Encoding pictures", leave=False, delay=2, disable=not accelerator.is_main_process or None)
    for half, index, size in bar:
        view, pixels = dataset.view_and_pixels(half, index, size, 0, index)
        picture = (half, dataset.halves[half][index].name, size, view)
        if picture not in seen:
            mean, std = encode_pixels(vae, pixels[None])
            seen[picture] = LatentDistribution(mean[0].cpu(), std[0].cpu())
        encoded[half, index, size] = seen[picture]
    dataset.cached = gather_dicts(encoded)


# ======================================================================================================================
# 5. Flow matching (edit freely)
#
# B pictures, C latent channels, H x W latent height and width (pixels / 8), L = H/2 * W/2 image tokens, T text tokens,
# D and P the widths of T5 and CLIP. sigma 1 is pure noise; the model predicts the velocity `noise - latents`.
# ======================================================================================================================


def load_scheduler(args: Namespace) -> FlowMatchEulerDiscreteScheduler:
    """The sampler that comes with the model; fresh, its `sigmas` are the table that training draws from."""
    return from_base(FlowMatchEulerDiscreteScheduler, args, subfolder="scheduler")


def flow_shift(setting: float | str | None, tokens: int, config: Any) -> float:
    """The shift for a picture of L image tokens: "dynamic" is exp(mu) of FLUX.1's sampler, mu linear in L."""
    if setting != "dynamic":
        return 1.0 if setting is None else float(setting)
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return math.exp(config.base_shift + slope * (tokens - config.base_image_seq_len))


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Sigmas moved towards noise for a shift above 1; https://arxiv.org/abs/2403.03206, equation 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sample_sigmas(
    generators: list[torch.Generator],
    sigma_table: Tensor,
    weighting_scheme: str = "none",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    shift: float = 1.0,
) -> Tensor:
    """Draw one noise level a picture, with a generator each: (B,), float32.

    A place u in [0, 1) is drawn by the scheme (logit_normal and mode: https://arxiv.org/abs/2403.03206, section 3.1;
    the others uniformly) and looked up in the scheduler's table, which falls from 1 to 1/1000; then it is shifted.
    """
    places = [
        compute_density_for_timestep_sampling(
            weighting_scheme, 1, logit_mean, logit_std, mode_scale, generator=generator
        )
        for generator in generators
    ]
    index = (torch.cat(places) * len(sigma_table)).long().clamp(0, len(sigma_table) - 1)
    return shift_sigmas(sigma_table[index].float(), shift)


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Latents (B, C, H, W) on their straight path to noise, at sigmas (B,); https://arxiv.org/abs/2210.02747."""
    sigmas = sigmas.view(-1, 1, 1, 1)
    return (1 - sigmas) * latents + sigmas * noise


def pack_latents(latents: Tensor) -> Tensor:
    """Each 2 x 2 patch of latents (B, C, H, W) becomes a token: (B, L, 4C)."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), 4 * channels)


def make_image_ids(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Position of each token, (L, 3): zero, row, column, for latents of `height` x `width`."""
    sides = (torch.arange(side // 2, device=device, dtype=torch.float32) for side in (height, width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3)


def make_guidance(transformer: nn.Module, scale: float, batch: int, device: torch.device) -> Tensor | None:
    """The guidance input of an unwrapped transformer, (B,), or None if it takes none (FLUX.1 [schnell])."""
    config: Any = transformer.config
    return torch.full((batch,), scale, device=device) if config.guidance_embeds else None


def predict_velocity(
    transformer: nn.Module,
    noisy_latents: Tensor,
    sigmas: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    guidance: Tensor | None,
) -> Tensor:
    """The one call of the model, in the field's words.

    Args:
        transformer: a FluxTransformer2DModel, wrapped or not. It takes sigma itself as its timestep.
        noisy_latents: (B, C, H, W).
        sigmas: (B,).
        prompt_embeds: (B, T, D), from T5.
        pooled_prompt_embeds: (B, P), from CLIP.
        guidance: (B,), or None for a model without guidance embeddings.

    Returns:
        The velocity, packed: (B, L, 4C).
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


def flow_matching_loss(
    velocity: Tensor, latents: Tensor, noise: Tensor, sigmas: Tensor, weighting_scheme: str = "none"
) -> Tensor:
    """Weighted mean squared error of the velocity, a picture: (B,), float32.

    Packing is a permutation, so the mean is taken over the packed tokens. Weights: sigma_sqrt 1 / sigma^2, cosmap
    2 / (pi * (1 - 2 sigma + 2 sigma^2)), else 1 (https://arxiv.org/abs/2403.03206).
    """
    errors = velocity.float() - pack_latents(noise - latents).float()
    return compute_loss_weighting_for_sd3(weighting_scheme, sigmas) * errors.square().mean(dim=(1, 2))


def weigh_losses(losses: Tensor, weights: Tensor, prior_loss_weight: float) -> Tensor:
    """Losses of B instance pictures, or of B instance and B class pictures, as one number.

    With weights (B,) of 1/B: the mean over the instance pictures, plus `prior_loss_weight` times that over the class
    pictures (https://arxiv.org/abs/2208.12242, equation 2).
    """
    if len(losses) == len(weights):
        return (weights * losses).sum()
    instance, prior = losses.chunk(2)
    return (weights * instance).sum() + prior_loss_weight * (weights * prior).sum()


def training_loss(
    transformer: nn.Module,
    latents: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    guidance: Tensor | None,
    weights: Tensor,
    weighting_scheme: str = "none",
    prior_loss_weight: float = 1.0,
) -> Tensor:
    """From latents, noise and sigmas to the loss of a micro-batch: a scalar. To change the loss, start here."""
    noisy_latents = add_noise(latents, noise, sigmas)
    velocity = predict_velocity(transformer, noisy_latents, sigmas, prompt_embeds, pooled_prompt_embeds, guidance)
    losses = flow_matching_loss(velocity, latents, noise, sigmas, weighting_scheme)
    return weigh_losses(losses, weights, prior_loss_weight)


# ======================================================================================================================
# 6. Transformer (edit freely): what is trained, and in which precision
# ======================================================================================================================


def list_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of an unwrapped transformer, in the order in which they run."""
    model: Any = transformer
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def keep_dtype(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """What an RMSNorm returns, in the precision of its input: CUDA's autocast of torch 2.13 makes it float32."""
    return output.to(inputs[0].dtype)


def set_up_blocks(args: Namespace, transformer: FluxTransformer2DModel) -> None:
    """Switch on what is asked for of how the blocks compute."""
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    backend = "_native_npu" if args.enable_npu_flash_attention else args.attention_backend
    if backend:
        transformer.set_attention_backend(backend)
    for module in transformer.modules():
        if isinstance(module, nn.RMSNorm):  # of queries and keys, which flash attention takes in half precision only
            module.register_forward_hook(keep_dtype)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the processes hold parts of what is trained (FSDP2, ZeRO), so that all must run each forward together."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def read_transformer(args: Namespace, accelerator: Accelerator, dtype: torch.dtype) -> FluxTransformer2DModel:
    """The transformer, frozen in `dtype`: on the device, or on the CPU for an engine that shards it.

    Only process 0 reads the file where the engine gives its weights to all, as DDP, FSDP2 and ZeRO do: the others
    reserve memory, which stays untouched on the CPU.
    """
    device = torch.device("cpu") if is_sharded(accelerator) else accelerator.device
    replicated = accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    given = is_sharded(accelerator) or replicated
    given = given and not args.fused_backward_pass  # which replaces DDP
    if accelerator.is_main_process or not given:
        return load_frozen_transformer(args, dtype, device)
    options = hub_options(args, subfolder="transformer")
    config = FluxTransformer2DModel.load_config(args.pretrained_model_name_or_path, **options)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config).to(dtype)
    return transformer.to_empty(device=device).requires_grad_(False)


def compile_blocks(accelerator: Accelerator, transformer: nn.Module) -> None:
    """Compile each block by accelerate's dynamo settings; one graph serves all blocks of a kind.

    The forward functions are compiled, not the modules: names of weights stay, and hooks run outside.
    """
    plugin, blocks = accelerator.state.dynamo_plugin, list_blocks(transformer)
    if plugin.backend == DynamoBackend.NO or plugin.disable:
        return
    logger.info(f"Compiling the blocks with {plugin.backend.value.lower()}: the first steps take longer")
    for block in blocks:
        compiled = torch.compile(block.forward, **plugin.to_kwargs())
        block.forward = functools.partial(run_compiled, block, compiled, blocks)  # type: ignore[method-assign]
    plugin.backend = DynamoBackend.NO  # `prepare` would compile the whole


def run_compiled(block: nn.Module, compiled: Callable, blocks: list[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """A block's compiled forward; where compiling fails, all `blocks` go on uncompiled."""
    try:
        return compiled(*args, **kwargs)
    except torch._dynamo.exc.TorchDynamoException as error:
        logger.warning(f"Compiling failed, so the blocks run uncompiled: {str(error).splitlines()[0]}")
        for other in blocks:
            vars(other).pop("forward", None)
        return block.forward(*args, **kwargs)


def load_frozen_transformer(args: Namespace, dtype: torch.dtype, device: torch.device) -> FluxTransformer2DModel:
    """The transformer in `dtype`, read tensor by tensor straight to `device`."""
    return from_base(
        FluxTransformer2DModel, args, subfolder="transformer", dtype=dtype, device_map={"": device}
    ).requires_grad_(False)


def load_transformer(args: Namespace, accelerator: Accelerator) -> FluxTransformer2DModel:
    """The transformer, all of it trainable, in float32, or in bfloat16 with `--full_bf16`."""
    transformer = read_transformer(args, accelerator, torch.bfloat16 if args.full_bf16 else torch.float32)
    set_up_blocks(args, transformer)
    return transformer.requires_grad_(True).train()


def load_text_encoder(args: Namespace) -> CLIPTextModel:
    """CLIP, all of it trainable, in float32."""
    text_encoder = from_base(CLIPTextModel, args, subfolder="text_encoder", dtype=torch.float32)
    if args.gradient_checkpointing:
        text_encoder.gradient_checkpointing_enable()
    return text_encoder.requires_grad_(True).train()


# ======================================================================================================================
# 7. Optimizer and schedule
# ======================================================================================================================


def parameter_groups(args: Namespace, transformer: nn.Module, text_encoder: nn.Module | None) -> list[dict]:
    """The trainable parameters with their learning rates and weight decays."""
    groups = [{"params": transformer, "lr": args.learning_rate, "weight_decay": args.adam_weight_decay}]
    if text_encoder is not None:
        # Prodigy estimates one step size for all and refuses groups with different rates.
        lr = args.learning_rate if args.optimizer.lower() == "prodigy" else args.text_encoder_lr
        groups.append({"params": text_encoder, "lr": lr, "weight_decay": args.adam_weight_decay_text_encoder})
    for group in groups:
        group["params"] = [parameter for parameter in group["params"].parameters() if parameter.requires_grad]
    return groups


OPTIONS = (  # of an optimizer's groups: what the flags say, and not what was learned
    "initial_lr", "weight_decay", "betas", "eps", "beta3", "decouple", "use_bias_correction", "safeguard_warmup",
)  # fmt: skip


def library_optimizer(args: Namespace, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer` over `groups`. To add another one, add it here and in `contradictions`."""
    common = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer.lower() == "prodigy":
        from prodigyopt import Prodigy  # optional

        return Prodigy(
            groups,
            **common,
            beta3=args.prodigy_beta3,
            decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction,
            safeguard_warmup=args.prodigy_safeguard_warmup,
        )
    if args.optimizer.lower() == "adafactor":  # the learning rate is the user's, not relative to step or weights
        return Adafactor(groups, lr=args.learning_rate, scale_parameter=False, relative_step=False)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit  # optional

        return AdamW8bit(groups, **common)
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(groups, **common, fused=device in ("cpu", "cuda", "mps", "xpu"))


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
        seed: of the rounding, which draws from generators of its own.
    """

    def __init__(self, groups: list[dict], make: Callable[[list[dict]], torch.optim.Optimizer], seed: int) -> None:
        super().__init__(groups, {"lr": groups[0]["lr"]})
        self.seed, self.steps, self.max_grad_norm, self.squared_norm = seed, 0, math.inf, torch.zeros(())
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
        norm = nn.utils.clip_grad_norm_([parameter], self.max_grad_norm)
        self.squared_norm = self.squared_norm.to(norm) + norm.float().square()
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
            with keep_options(optimizer):
                optimizer.load_state_dict(state_dict["state"][number])


def make_optimizer(args: Namespace, groups: list[dict], seed: int) -> torch.optim.Optimizer:
    """The optimizer, one parameter at a time where `--full_bf16` or `--fused_backward_pass` asks for it."""
    if not (args.full_bf16 or args.fused_backward_pass):
        return library_optimizer(args, groups)
    optimizer = PerParameterOptimizer(groups, functools.partial(library_optimizer, args), seed)
    if args.fused_backward_pass:
        optimizer.fuse(args.max_grad_norm or math.inf)
    return optimizer


@contextlib.contextmanager
def keep_options(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, an optimizer takes the state of a checkpoint; its settings stay those of the flags."""
    own = [{name: group[name] for name in OPTIONS if name in group} for group in optimizer.param_groups]
    yield
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)


def make_lr_scheduler(args: Namespace, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule, which moves once an optimizer step, however many processes there are."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        step_rules=args.lr_step_rules,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


@dataclass
class RunState:
    """Where a run is. With the weights and the optimizer's state, all that an exact resume needs."""

    step: int  # optimizer steps done
    seed: int
    untrained_loss: float | None = None  # the validation loss before the first step, of the same pictures
    owes_validation: bool = False  # whether a stop came before a validation that was due
    losses: list[float] = field(default_factory=list)  # of each step, for the model card
    seconds: float = 0.0  # that the steps took


@dataclass
class TrainingData:
    """What the stages before the transformer leave behind."""

    dataset: DreamBoothDataset
    prompts: dict[str, PromptEmbeds]
    vae: Any  # AutoencoderKL, or None when nothing needs it any more
    shift_factor: float
    scaling_factor: float
    validation: list[tuple[str, Tensor]]  # prompt and latents of the pictures of the validation loss
    facts: dict[str, Any]  # what a checkpoint remembers of the data
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
    """A training run: its flags and processes, what the stages left behind, what is trained, and where it stands."""

    args: Namespace
    accelerator: Accelerator
    data: TrainingData
    trained: Trained
    state: RunState


# ======================================================================================================================
# 8. Checkpoints (plumbing)
# ======================================================================================================================

STATE_FILE = "training_state.json"  # written last: a checkpoint folder without it is not whole
RESULT_FILE = "training_result.json"  # written last of all: without it a run is not finished
LOCK_SECONDS = 60
HELD: list[FileLock] = []  # the lock of the folder that this process writes to
PIECE = 2**28  # bytes that one thread hashes at a time
UMASK = os.umask(0o077)
os.umask(UMASK)  # there is no call that only reads it
PARTIAL, OLD = ".flux-partial", ".flux-old"  # ends of names that are being written, or replaced
FREE_TO_CHANGE = {  # flags that may differ between a run and its resumption without changing the training
    "output_dir", "logging_dir", "report_to", "resume_from_checkpoint", "checkpointing_steps",
    "checkpoints_total_limit", "max_train_steps", "num_train_epochs", "num_validation_images", "validation_epochs",
    "validation_steps", "validation_guidance_scale", "validation_num_inference_steps", "skip_final_inference",
    "validation_prompt", "validation_loss", "validation_data_dir", "push_to_hub", "hub_model_id", "cache_dir",
    "local_rank", "seed", "dataloader_num_workers", "upcast_before_saving", "sample_batch_size", "save_single_file",
     "instance_data_dir", "class_data_dir", "validation pictures",
}  # fmt: skip


def settings(args: Namespace) -> dict[str, Any]:
    """The flags as plain values, without the token: for trackers, checkpoints and the model card."""
    return {name: value for name, value in vars(args).items() if name != "hub_token"}


def plain_settings(args: Namespace) -> dict[str, bool | int | float | str]:
    """The flags as trackers take them: no None, no lists."""
    plain = {name: value for name, value in settings(args).items() if isinstance(value, bool | int | float | str)}
    return {name: "" if value is None else json.dumps(value) for name, value in settings(args).items()} | plain


def hash_piece(path: Path, start: int) -> bytes:
    """XXH3 of at most PIECE bytes of a file from `start` on."""
    digest, buffer, left = xxhash.xxh3_64(), memoryview(bytearray(2**22)), PIECE
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[:left])):
            digest.update(buffer[:count])
            left -= count
    return digest.digest()


def checksums(paths: Iterable[Path]) -> dict[Path, str]:
    """Of each file the XXH3 of those of its pieces, which threads read side by side: a checkpoint may have 143 GB."""
    pieces = [(path, start) for path in paths for start in range(0, max(1, path.stat().st_size), PIECE)]
    whole: dict[Path, Any] = {path: xxhash.xxh3_64() for path, _ in pieces}
    with ThreadPoolExecutor() as pool:
        for (path, _), digest in zip(pieces, pool.map(hash_piece, *zip(*pieces, strict=True)), strict=True):
            whole[path].update(digest)
    return {path: digest.hexdigest() for path, digest in whole.items()}


def crc32(path: Path) -> int:
    """The checksum of a file in checkpoints of earlier versions."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            value = zlib.crc32(chunk, value)
    return value


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names where a system can tell, is on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes what may be written
    except PermissionError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    os.fsync(descriptor)
    os.close(descriptor)


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


@atexit.register
def unlock_folder() -> None:
    """Let other runs into the folder that this process has locked, if it has."""
    while HELD:
        with contextlib.suppress(OSError):  # Windows removes the file itself
            Path(HELD[-1].lock_file).unlink()
        HELD.pop().release()


def lock_folder(folder: Path) -> None:
    """Keep other runs on this machine out of `folder` while this process lives; one that is ending is waited for.

    Raises:
        UsageError: if another run still writes there.
    """
    unlock_folder()
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]  # beside the user's files it would stay
    lock = FileLock(Path(tempfile.gettempdir()) / f"flux-{name}.lock")
    for seconds in (0, LOCK_SECONDS):
        try:
            lock.acquire(timeout=seconds)
            HELD.append(lock)  # only now: what this process does not hold it must not remove
            return
        except Timeout:
            if not seconds:
                logger.warning(f"Another run is using {folder}; waiting up to {LOCK_SECONDS} s")
        except (OSError, NotImplementedError):  # a disk that has no locks
            return
    raise UsageError(
        f"--output_dir is {str(folder)!r}, which another run is using; wait for it, or give another folder"
    )


def set_aside(args: Namespace, step: int, facts: dict[str, Any] | None, changed: bool) -> None:
    """Move what an earlier run left in `--output_dir` and could be taken for this one's into a folder of its own.

    All of it where a run starts anew. Where one goes on at `step` from a checkpoint of the folder, which says `facts`
    of itself: what is later than that, what is written on request only, pictures of other prompts; the result as well
    where the training has `changed` since.
    """
    output, kept = Path(args.output_dir), step
    patterns = [*(RESULTS if facts is None or changed else ON_REQUEST)]
    before = facts["args"] if facts else {"validation_prompt": None}
    if any(before.get(name) != getattr(args, name) for name in ("validation_prompt", "num_validation_images")):
        patterns, kept = [*patterns, SHEET_FILE], -1
    left = [path for pattern in patterns for path in output.glob(pattern)]
    left += [path for number, path in list_checkpoints(output).items() if number > step]
    left += [path for (number, _), path in list_validation_pictures(output).items() if number > kept]
    if left:
        free = (output / f"earlier-{number}" for number in itertools.count(1))
        folder = next(path for path in free if not path.exists())
        for path in left:
            target = folder / path.relative_to(output)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        logger.warning(f"Moved what an earlier run left to {folder}: {shorten([path.name for path in left])}")


def list_validation_pictures(output_dir: Path) -> dict[tuple[int, int], Path]:
    """The pictures that were drawn on the way, by step and number."""
    paths = (output_dir / "validation").glob("step_*.png")
    found = ((re.fullmatch(r"step_(\d+)_(\d+)\.png", path.name), path) for path in paths)
    return {(int(match[1]), int(match[2])): path for match, path in found if match}


def remove_leftovers(output_dir: Path) -> None:
    """Undo what a killed run left half-done, which its names show."""
    for old in output_dir.glob(f".*{OLD}"):
        final = old.with_name(old.name[1 : -len(OLD)])
        if final.exists():
            shutil.rmtree(old)
        else:  # killed between the two renames of `replace_path`
            old.rename(final)
    for partial in output_dir.glob(f".*{PARTIAL}"):
        logger.info(f"Removing {partial.name}, which a killed run left half-written")
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def list_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The checkpoints in `output_dir`, whole or not, by step, in order."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, after every file of it was compared with its checksum.

    Raises:
        UsageError: if a file is missing or damaged, or the checkpoint is from the other script.
    """
    try:
        content = json.loads((path / STATE_FILE).read_text())
        files, facts = content["files"], content["facts"]
        if zlib.crc32(json.dumps([files, facts]).encode()) != content["checksum"]:
            raise ValueError("does not match its checksum")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not whole, or damaged: {STATE_FILE}: {error}") from error
    there = {path / name: expected for name, expected in files.items() if (path / name).is_file()}
    found = checksums(file for file, expected in there.items() if isinstance(expected, str))
    found |= {file: crc32(file) for file, expected in there.items() if isinstance(expected, int)}  # earlier versions'
    if damaged := [name for name, expected in files.items() if found.get(path / name) != expected]:
        raise UsageError(f"{path} is damaged: {shorten(damaged)}: missing, or not matching the checksum")
    if facts["script"] != Path(__file__).name:
        raise UsageError(f"{path} was written by {facts['script']}, which trains other weights")
    return facts


def find_checkpoint(args: Namespace) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that `--resume_from_checkpoint` names and what it says of itself, or None to start anew.

    Raises:
        UsageError: if there is none of that name, with those that there are, or if it is damaged.
    """
    wanted, checkpoints = args.resume_from_checkpoint, list_checkpoints(args.output_dir)
    if not wanted:
        return None
    if wanted != "latest":
        for path in (Path(wanted), Path(args.output_dir) / wanted):
            if (path / STATE_FILE).is_file():
                return path, read_checkpoint(path)
        names = ", ".join(path.name for path in checkpoints.values() if (path / STATE_FILE).is_file()) or "none"
        flag = f"--resume_from_checkpoint is {wanted!r}"
        raise UsageError(f"{flag}, which is no checkpoint; {args.output_dir} has {names}")
    for path in reversed(checkpoints.values()):
        try:
            return path, read_checkpoint(path)
        except UsageError as error:
            logger.warning(f"Passing over a checkpoint: {error}")
    if checkpoints:
        raise UsageError("--resume_from_checkpoint=latest: no checkpoint is whole; leave the flag out to start anew")
    logger.info(f"--resume_from_checkpoint=latest: no checkpoint in {args.output_dir}, so this run starts anew")
    return None


def check_fits(args: Namespace, path: Path, facts: dict[str, Any]) -> None:
    """See that a checkpoint has the weights and the optimizer's state of this run.

    Raises:
        UsageError: naming the flags to give as they were.
    """
    before, now = facts["args"], settings(args)
    names = (
        "train_text_encoder", "use_ema", "optimizer", "use_8bit_adam", "rank", "lora_layers", "use_dora", "full_bf16",
        "fused_backward_pass",
    )  # fmt: skip
    changed = [name for name in names if str(before.get(name)).lower() != str(now.get(name)).lower()]
    if changed:
        wanted = ", ".join(f"--{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise UsageError(f"{path} does not fit this run: {wanted}. Give them as they were, or start anew")


def changes_since(args: Namespace, facts: dict[str, Any], data: dict[str, Any]) -> Iterator[str]:
    """How this run differs from the one that wrote a checkpoint, in what changes the training."""
    before, now = facts["args"] | facts["data"], settings(args) | data
    free = FREE_TO_CHANGE - (set() if args.lr_scheduler.startswith("constant") else {"max_train_steps"})
    for name in sorted(before.keys() & now.keys()):
        if name not in free and before.get(name) != now.get(name):
            yield f"{name} was {before.get(name)!r} and is {now.get(name)!r}"


def checkpoint_bytes(trained: Trained) -> int:
    """About what a checkpoint takes on the disk: float32 weights and the optimizer's state."""
    states = torch.utils._pytree.tree_leaves(trained.optimizer.state_dict())
    copies = 1 if trained.ema is None else 2
    return 2**20 + copies * 4 * trained.size + sum(value.nbytes for value in states if isinstance(value, Tensor))


@contextlib.contextmanager
def writing(args: Namespace, what: str, partial: Path, needed: int) -> Iterator[None]:
    """Around what writes `what`, of about `needed` bytes, into `partial`: if that fails, nothing of it is left.

    Raises:
        RunError: with the bytes that it takes and how to go on.
    """
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
def by_product(what: str) -> Iterator[None]:
    """Around what the training can do without: if it cannot be written, a warning says so and the run goes on."""
    try:
        yield
    except (OSError, ValueError) as error:
        logger.warning(f"{what} could not be written: {error}")


def finished_settings(args: Namespace) -> dict[str, Any]:
    """What a finished run was asked for: the flags, but for those that say where."""
    where = ("output_dir", "logging_dir", "cache_dir", "resume_from_checkpoint", "local_rank")
    return {name: value for name, value in settings(args).items() if name not in where}


def is_finished(args: Namespace) -> bool:
    """Whether the run that `latest` would go on with is done, all that the flags ask for included."""
    try:
        before = json.loads((Path(args.output_dir) / RESULT_FILE).read_text())
    except (OSError, ValueError):  # a result without its mark may be of another run
        return False
    return args.resume_from_checkpoint == "latest" and before == finished_settings(args)


def mark_finished(args: Namespace) -> None:
    """Write the last file of a run, unless a picture that the flags ask for is missing."""
    if not all((Path(args.output_dir) / name).exists() for name in final_pictures(args)):
        return
    partial = Path(args.output_dir) / f".{RESULT_FILE}{PARTIAL}"
    partial.write_text(json.dumps(finished_settings(args), indent=2) + "\n")
    replace_path(partial, Path(args.output_dir) / RESULT_FILE)


def save_checkpoint(run: Run) -> None:
    """Write `checkpoint-<step>`: called on all processes, whole or not there, the oldest pruned after."""
    args, accelerator, state = run.args, run.accelerator, run.state
    output, needed = Path(args.output_dir), checkpoint_bytes(run.trained)
    partial = output / f".checkpoint-{state.step}{PARTIAL}"
    with writing(args, f"checkpoint-{state.step}", partial, needed):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            if shutil.disk_usage(output).free < needed:
                raise OSError("not enough space")
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial), exclude_frozen_parameters=True)  # DeepSpeed's word
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        hashes = checksums(path for path in sorted(partial.rglob("*")) if path.is_file())
        files = {path.relative_to(partial).as_posix(): value for path, value in hashes.items()}
        facts = {"script": Path(__file__).name, "state": asdict(state), "args": settings(args), "data": run.data.facts}
        content = {"files": files, "facts": facts, "checksum": zlib.crc32(json.dumps([files, facts]).encode())}
        (partial / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n")
        replace_path(partial, output / f"checkpoint-{state.step}")
    logger.info(f"Saved checkpoint-{state.step}")
    if args.checkpoints_total_limit:
        found = list_checkpoints(output).items()
        earlier = [path for number, path in found if number < state.step and (path / STATE_FILE).is_file()]
        for path in earlier[: max(0, len(earlier) + 1 - args.checkpoints_total_limit)]:
            shutil.rmtree(path.rename(path.with_name(f".{path.name}{PARTIAL}")))  # never a half-deleted checkpoint


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


def load_weights(model: Any, folder: Path) -> None:
    """Give an unwrapped model the weights of a checkpoint.

    Raises:
        UsageError: if the checkpoint has none of this model.
    """
    name = component_name(model)
    pattern = TRANSFORMER_FILES if name == "transformer" else "model{suffix}.safetensors"
    if not (folder / name).is_dir():
        raise UsageError(f"{folder} has no {name}/: it is from a run without --train_text_encoder")
    load_torch_model(model, folder / name, strict=True, filename_pattern=pattern)


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


def follow_flags(trained: Trained) -> None:
    """Let the learning rates follow the flags from where the schedule stands: a checkpoint brings its own run's."""
    schedule, groups = trained.lr_scheduler.scheduler, trained.optimizer.param_groups
    schedule.base_lrs = [group["initial_lr"] for group in groups]
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, lr in zip(groups, schedule._last_lr, strict=True):
        group["lr"] = lr


# ======================================================================================================================
# 9. Sampling
# ======================================================================================================================


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG or JPEG that is whole or not there."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    picture.save(partial, format="PNG" if path.suffix == ".png" else "JPEG", quality=92)
    partial.replace(path)


def make_sampler(args: Namespace, transformer: nn.Module) -> FluxPipeline:
    """The pipeline of an unwrapped transformer, which is used as it is, neither cast nor moved."""
    sampler = FluxPipeline(load_scheduler(args), None, None, None, None, None, transformer)
    sampler.set_progress_bar_config(disable=True)
    return sampler


@torch.no_grad()
def draw_pictures(
    args: Namespace,
    sampler: FluxPipeline,
    vae: AutoencoderKL,
    prompts: list[PromptEmbeds],
    dtype: torch.dtype,
    generators: list[torch.Generator],
    **options: Any,
) -> list[Image.Image]:
    """A picture of each prompt from the noise of its generator, at the training's resolution and text length.

    `dtype` is that of the prompts, `options` are the pipeline's.
    """
    latents = sampler(
        prompt_embeds=torch.stack([prompt.prompt_embeds for prompt in prompts]).to(vae.device, dtype),
        pooled_prompt_embeds=torch.stack([prompt.pooled_prompt_embeds for prompt in prompts]).to(vae.device, dtype),
        height=args.resolution,
        width=args.resolution,
        generator=generators,
        output_type="latent",
        **options,
    ).images
    return [decode_latents(vae, own[None], args.resolution) for own in latents]


def generate_class_pictures(args: Namespace, accelerator: Accelerator, seed: int) -> None:
    """Draw the class pictures that are missing, at the training resolution, the processes sharing the work.

    Raises:
        UsageError: if the machines do not share the folder.
    """
    folder = Path(args.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        remove_leftovers(folder)
    missing = args.num_class_images - len(list_picture_files(folder))
    free = (number for number in range(2 * args.num_class_images) if not (folder / f"class_{number:05d}.png").exists())
    numbers = [next(free) for _ in range(missing)]
    accelerator.wait_for_everyone()  # nobody writes before all have counted
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    default = torch.float32 if accelerator.device.type == "cpu" else torch.bfloat16
    dtype = PRECISIONS.get(args.prior_generation_precision, default)
    encoded = encode_prompts(args, accelerator, [args.class_prompt], dtype)  # frees the encoders: 10 GB of FLUX.1 [dev]
    if mine:
        sampler = make_sampler(args, load_frozen_transformer(args, dtype, accelerator.device))
        vae = load_vae(args, accelerator)
        hidden = not accelerator.is_local_main_process or None  # None: where there is no terminal
        bar = tqdm(total=len(mine), desc="Generating class pictures", disable=hidden)
        for start in range(0, len(mine), args.sample_batch_size):
            part = mine[start : start + args.sample_batch_size]
            noise = [generator_for(seed, "class picture", number) for number in part]
            prompts = [encoded[args.class_prompt]] * len(part)
            pictures = draw_pictures(args, sampler, vae, prompts, dtype, noise)
            for number, picture in zip(part, pictures, strict=True):
                save_picture(picture, folder / f"class_{number:05d}.png")
            bar.update(len(part))
        bar.close()
    accelerator.wait_for_everyone()
    if len(list_picture_files(folder)) < args.num_class_images:
        raise UsageError(
            f"--class_data_dir is {args.class_data_dir!r}: each machine has drawn a part; share the folder"
        )


def own_share(accelerator: Accelerator, count: int) -> range:
    """This process's part of `count` forwards; as many on all processes, numbers from `count` on are fillers."""
    processes = accelerator.num_processes
    return range(accelerator.process_index, math.ceil(count / processes) * processes, processes)


def sample_pictures(
    args: Namespace,
    accelerator: Accelerator,
    transformer: FluxTransformer2DModel,
    vae: AutoencoderKL,
    embeds: list[PromptEmbeds],
    seed: int,
    numbers: range,
    desc: str,
) -> dict[int, Image.Image]:
    """Draw the pictures of these numbers, `--num_validation_images` of each prompt, from the same noise every time.

    Numbers beyond the last are fillers, which only keep the processes of a sharded model in step.
    """
    images, count = args.num_validation_images, args.num_validation_images * len(embeds)
    options = {
        "guidance_scale": args.validation_guidance_scale,
        "num_inference_steps": args.validation_num_inference_steps,
    }
    dtype, was_training = torch.float32 if transformer.training else transformer.dtype, transformer.training
    sampler, pictures = make_sampler(args, transformer.eval()), {}
    for number in tqdm(numbers, desc=desc, leave=False, disable=not accelerator.is_local_main_process or None):
        prompt, noise = embeds[number % count // images], generator_for(seed, "validation", number % images)
        [picture] = draw_pictures(args, sampler, vae, [prompt], dtype, [noise], **options)
        if number < count:
            pictures[number] = picture
    transformer.train(was_training)
    return pictures


def log_pictures(accelerator: Accelerator, name: str, pictures: list[Image.Image], step: int) -> None:
    """Send pictures to the trackers that take them."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images(
                {name: np.stack([np.asarray(picture) for picture in pictures])}, step, dataformats="NHWC"
            )
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: pictures}, step)


@torch.no_grad()
def embed_prompt(accelerator: Accelerator, text_encoder: nn.Module | None, embeds: PromptEmbeds) -> PromptEmbeds:
    """The prompt as a CLIP that is trained sees it now; unchanged if there is none."""
    if text_encoder is None:
        return embeds
    was_training = text_encoder.training
    pooled = pool_with_clip(text_encoder.eval(), embeds.clip_ids[None].to(accelerator.device))
    text_encoder.train(was_training)
    return embeds._replace(pooled_prompt_embeds=pooled[0].cpu())


def draw_contact_sheet(args: Namespace, step: int) -> Image.Image:
    """The validation pictures up to `step` on one sheet: steps down, prompts across; long runs thinned evenly."""
    cells = list_validation_pictures(Path(args.output_dir))
    steps = sorted({at for at, _ in cells if at <= step})
    rows = sorted({steps[round(row * (len(steps) - 1) / (SHEET_ROWS - 1))] for row in range(SHEET_ROWS)})
    prompts, font, label, header = validation_prompts(args), ImageFont.load_default(16), 64, 48
    columns = len(prompts) * args.num_validation_images
    sheet = Image.new("RGB", (label + columns * SHEET_CELL, header + len(rows) * SHEET_CELL), "white")
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        title = textwrap.fill(prompts[column // args.num_validation_images], 30, max_lines=2, placeholder=" …")
        draw.text((label + column * SHEET_CELL + 4, 4), title, "black", font)
    for row, at in enumerate(rows):
        draw.text((label - 8, header + (row + 0.5) * SHEET_CELL), str(at), "black", font, anchor="rm")
        for column in range(columns):
            if (at, column) in cells:
                with Image.open(cells[at, column]) as picture:
                    cell = ImageOps.contain(picture, (SHEET_CELL - 4, SHEET_CELL - 4))
                sheet.paste(cell, (label + column * SHEET_CELL + 2, header + row * SHEET_CELL + 2))
    return sheet


def draw_validation_pictures(run: Run) -> None:
    """Draw pictures from the live model, into `output_dir/validation`, the contact sheet and the trackers."""
    args, accelerator, data, state = run.args, run.accelerator, run.data, run.state
    prompts = [data.prompts[prompt] for prompt in validation_prompts(args)]
    embeds = [embed_prompt(accelerator, run.trained.text_encoder, prompt) for prompt in prompts]
    transformer, vae = unwrap(run.trained.transformer), data.vae.to(accelerator.device)
    numbers = own_share(accelerator, args.num_validation_images * len(embeds))
    mine = sample_pictures(args, accelerator, transformer, vae, embeds, state.seed, numbers, "Validation")
    pictures = [picture for _, picture in sorted(gather_dicts(mine).items())]
    if data.dataset.cached is not None:  # the training does not need it in between
        vae.to("cpu")
    if accelerator.is_main_process:
        folder = Path(args.output_dir) / "validation"
        with by_product("The validation pictures"):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            for number, picture in enumerate(pictures):
                save_picture(picture, folder / f"step_{state.step:06d}_{number}.png")
            save_picture(draw_contact_sheet(args, state.step), Path(args.output_dir) / SHEET_FILE)
        log_pictures(accelerator, "validation", pictures, state.step)
    accelerator.wait_for_everyone()


@torch.no_grad()
def encode_validation_pictures(
    args: Namespace, accelerator: Accelerator, vae: AutoencoderKL, pictures: list[Picture]
) -> list[tuple[str, Tensor]]:
    """Prompt and latents (1, C, H, W) of each picture: centre crop, mean of the posterior, nothing random."""
    encoded = {}
    for number in range(accelerator.process_index, len(pictures), accelerator.num_processes):
        size = nearest_size(pictures[number].size, training_sizes(args))
        _, pixels = see(args, pictures[number], size, None)
        mean = encode_pixels(vae, pixels[None]).mean.cpu()
        latents = (mean - vae.config.shift_factor) * vae.config.scaling_factor
        encoded[number] = (pictures[number].prompt, latents)
    return [encoded for _, encoded in sorted(gather_dicts(encoded).items())]


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """Mean flow-matching loss of the validation pictures at fixed, equally spaced sigmas and fixed noise.

    Unlike the training loss, whose sigmas and noise are drawn anew, it compares from step to step and run to run.
    """
    accelerator, data = run.accelerator, run.data
    transformer, device = unwrap(run.trained.transformer), accelerator.device
    guidance = make_guidance(transformer, run.args.guidance_scale, 1, device)
    total, weights = torch.zeros((), device=device), torch.ones(1, device=device)
    transformer.eval()
    count = len(data.validation)
    for number in own_share(accelerator, count):
        prompt, latents = data.validation[number % count]
        embeds = embed_prompt(accelerator, run.trained.text_encoder, data.prompts[prompt])
        text, pooled = embeds.prompt_embeds[None].to(device), embeds.pooled_prompt_embeds[None].to(device)
        for level in range(VALIDATION_SIGMAS):
            sigmas = torch.full((1,), (level + 0.5) / VALIDATION_SIGMAS, device=device)
            noise = draw_normal(latents.shape[1:], 0, "validation", [(number, level)]).to(device)
            loss = training_loss(transformer, latents.to(device), noise, sigmas, text, pooled, guidance, weights)
            total += loss * (number < count)
    transformer.train()
    return accelerator.reduce(total, reduction="sum").item() / (count * VALIDATION_SIGMAS)


def log_validation_loss(run: Run) -> None:
    """Compute and log the validation loss, also relative to that of the untrained model where that was computed."""
    loss, state = validation_loss(run), run.state
    values, text = {"validation_loss": loss}, f"Validation loss at step {state.step}: {loss:.5f}"
    if state.step == 0:
        state.untrained_loss = loss
    if state.untrained_loss is not None:
        values["validation_loss_relative"] = loss / state.untrained_loss
        text += f", {values['validation_loss_relative']:.4f} of the untrained model's"
    logger.info(text)
    run.accelerator.log(values, step=state.step)


# ======================================================================================================================
# 10. Results (plumbing)
# ======================================================================================================================


def whole_weights(accelerator: Accelerator, model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The trained weights by name, in `dtype` or as trained, on the CPU of the main process; nothing on the others.

    Called on all processes: what is sharded is gathered tensor by tensor.
    """
    weights = {}
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
        index = json.loads((partial / "model_index.json").read_text())
        index |= {name: FluxPipeline.load_config(args.pretrained_model_name_or_path, **hub_options(args))[name]
                  for name in written}  # fmt: skip
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


def load_results(args: Namespace, dtype: torch.dtype, device: torch.device) -> FluxPipeline:
    """The pipeline that was saved, as a user would load it, but for T5, whose embeddings are at hand."""
    return FluxPipeline.from_pretrained(args.output_dir, text_encoder_2=None, tokenizer_2=None, dtype=dtype)


def draw_final_pictures(
    args: Namespace, accelerator: Accelerator, prompts: list[PromptEmbeds], state: RunState, dtype: torch.dtype
) -> None:
    """Draw pictures from what was saved, which proves the files; `image_<n>.png` and the trackers."""
    mine: dict[int, Image.Image] = {}
    # The first machine's processes share the work: another may not see what was saved.
    count, processes = args.num_validation_images * len(prompts), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    numbers = range(count)[accelerator.process_index :: processes]
    if accelerator.process_index == accelerator.local_process_index and numbers:
        pipeline = load_results(args, dtype, accelerator.device).to(accelerator.device)
        text_encoder = pipeline.text_encoder if args.train_text_encoder else None
        embeds = [embed_prompt(accelerator, text_encoder, prompt) for prompt in prompts]
        # In float16 the VAE's activations overflow.
        models = (pipeline.transformer.eval(), pipeline.vae.float() if dtype == torch.float16 else pipeline.vae)
        mine = sample_pictures(args, accelerator, *models, embeds, state.seed, numbers, "Final pictures")
    pictures = [picture for _, picture in sorted(gather_dicts(mine).items())]
    if accelerator.is_main_process:
        with by_product("The final pictures"):
            for number, picture in enumerate(pictures):
                save_picture(picture, Path(args.output_dir) / f"image_{number}.png")
        log_pictures(accelerator, "test", pictures, state.step)
    accelerator.wait_for_everyone()


def loading_code(args: Namespace, source: str, base: str) -> str:
    """Python that loads what was trained from `source`, a folder or a repository, and draws a picture with it.

    A LoRA needs its `base`, which the full script's result brings along.
    """
    load = f'{as_text(source)}, torch_dtype=torch.bfloat16).to("cuda")'
    prompt = (validation_prompts(args) or [args.instance_prompt or "a prompt like the captions"])[0]
    return (
        f"import torch\nfrom diffusers import FluxPipeline\n\npipeline = FluxPipeline.from_pretrained({load}\n"
        f"image = pipeline({prompt!r}, height={args.resolution}, width={args.resolution}).images[0]\n"
        'image.save("image.png")'
    )


def as_text(value: str) -> str:
    """A string as Python and JSON write it, in double quotes."""
    return json.dumps(value, ensure_ascii=False)


def as_code(value: Any) -> str:
    """A value as code in a line of Markdown, or in a cell of its tables."""
    text = str(value).replace("|", "\\|").replace("\n", " ")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def final_pictures(args: Namespace) -> dict[str, str]:
    """The files of the final pictures, and the prompt of each."""
    prompts = [] if args.skip_final_inference else validation_prompts(args)
    repeated = [prompt for prompt in prompts for _ in range(args.num_validation_images)]
    return {f"image_{number}.png": prompt for number, prompt in enumerate(repeated)}


def draw_loss_curve(losses: list[float]) -> Image.Image:
    """The loss of each step, pale, and the mean of the last twentieth of the run up to it, dark."""
    values, count, (width, height, left, foot) = np.array(losses), len(losses), (720, 260, 72, 28)
    ends, window = np.arange(1, count + 1), max(1, count // 20)
    means = np.array([values[max(0, end - window) : end].mean() for end in ends])
    low, high = values.min(), max(values.max(), values.min() + 1e-9)
    picture, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(14)
    draw = ImageDraw.Draw(picture)
    x = left + (width - left - 12) * (ends - 1) / max(1, count - 1)
    for curve, colour, thickness in ((values, "#b8cce4", 1), (means, "#1f4e9c", 3)):
        y = 12 + (height - foot - 12) * (high - curve) / (high - low)
        draw.line(list(zip(x.tolist(), y.tolist(), strict=True)), colour, thickness)
    draw.text((left - 8, 16), f"{high:.3g}", "black", font, anchor="rm")
    draw.text((left - 8, height - foot), f"{low:.3g}", "black", font, anchor="rm")
    draw.text((left, height - 4), f"loss, from step 1 to step {count}", "black", font, anchor="ls")
    return picture


def card_metadata(args: Namespace) -> ModelCardData:
    """What the Hub reads of a model card: base model, licence, trigger words, gallery."""
    base = args.pretrained_model_name_or_path
    return ModelCardData(
        base_model=None if Path(base).exists() else base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license="other",
        license_name="flux-1-dev-non-commercial-license",
        license_link="https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
        instance_prompt=args.instance_prompt,
        widget=[{"text": prompt, "output": {"url": name}} for name, prompt in final_pictures(args).items()],
        tags=["text-to-image", "diffusers", "diffusers-training", "flux", "flux-diffusers", "dreambooth", *TAGS],
    )


def describe_training(
    args: Namespace, accelerator: Accelerator, pictures: dict[str, list[Picture]], state: RunState
) -> dict[str, Any]:
    """What was trained on, for how long and on what; then every flag that differs from its default."""
    read = getattr(torch.get_device_module(accelerator.device), "get_device_name", None)
    device = read(accelerator.device) if read else accelerator.device.type.upper()
    captions = len({picture.prompt for picture in pictures["instance"]})
    per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    base, frozen = getattr(args, "base_quantization", ""), str(weight_dtype(accelerator)).removeprefix("torch.")
    rows = {
        "pictures of the subject": f"{len(pictures['instance'])} ({captions} prompts)",
        "pictures of the class": args.num_class_images if args.with_prior_preservation else None,
        "held-out pictures": len(pictures.get("validation", [])),
        "steps": f"{state.step}, of {per_step} pictures each",
        "time of the steps": tqdm.format_interval(state.seconds),
        "mixed precision": accelerator.mixed_precision,
        "frozen base": frozen if base == "none" else base,
        "hardware": f"{accelerator.num_processes} x {device}",
        "seed": state.seed,
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }
    parser = make_parser()
    for name, value in sorted(settings(args).items()):
        if name != "output_dir" and value != parser.get_default(name):
            path = name.endswith(("_dir", "_path", "_checkpoint"))
            rows[f"`--{name}`"] = as_code(Path(value).name if path and Path(value).is_absolute() else value)  # no home
    return {name: value for name, value in rows.items() if value}


def write_model_card(args: Namespace, repo_id: str, rows: dict[str, Any], state: RunState) -> None:
    """Write README.md for the Hub: gallery, trigger words, code that loads the result, settings, curve, licence."""
    output, base = Path(args.output_dir), args.pretrained_model_name_or_path
    link = f"`{Path(base).name}`" if Path(base).exists() else f"[{base}](https://huggingface.co/{base})"
    sheet = f"![steps down, prompts across]({SHEET_FILE})" if (output / SHEET_FILE).exists() else ""
    save_picture(draw_loss_curve(state.losses), output / CURVE_FILE)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    trigger = as_code(args.instance_prompt) if args.instance_prompt else "the words of the captions"
    body = f"""# {repo_id.split("/")[-1]}

A DreamBooth {KIND} of {link}, trained for {state.step} steps at {args.resolution} px.
{"CLIP was trained too" if args.train_text_encoder else "The text encoders were not trained"}.

{"<Gallery />" if final_pictures(args) else ""}

## Trigger words

Use {trigger} in the prompt.

## Use it

```python
{loading_code(args, repo_id, Path(base).name if Path(base).exists() else base)}
```

## Training

{sheet}

![loss of each step, and its running mean]({CURVE_FILE})

| what | value |
|---|---|
{table}

All other flags had their defaults.

## Licence

FLUX.1 [dev]'s: [non-commercial](https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md).
"""
    partial = output / f".README.md{PARTIAL}"
    ModelCard(f"---\n{card_metadata(args).to_yaml()}\n---\n\n{body}").save(partial)
    replace_path(partial, output / "README.md")


def closing_summary(args: Namespace, state: RunState) -> str:
    """What a finished run says: where everything is, and the code that uses the result."""
    output = Path(args.output_dir)
    patterns = {
        "result": "model_index.json",
        "pictures": "image_*.png", "on the way": SHEET_FILE, "model card": "README.md", "losses": CURVE_FILE,
        "checkpoints": "checkpoint-*",
    }  # fmt: skip
    lines = [f"Done: {state.step} steps in {tqdm.format_interval(state.seconds)}; the result is in {args.output_dir}"]
    for what, pattern in patterns.items():
        if paths := sorted(output.glob(pattern), key=lambda path: (len(path.name), path.name)):
            lines.append(f"  {what:<12} {paths[0]}" + (f" ... {paths[-1].name}" if len(paths) > 1 else ""))
    if (output / args.logging_dir).is_dir():
        lines.append(f"  {'curves':<12} {output / args.logging_dir}")
    code = loading_code(args, args.output_dir, args.pretrained_model_name_or_path).replace("\n", "\n    ")
    return "\n".join([*lines, "  To use it:", f"    {code}"])


def create_repository(args: Namespace) -> str:
    """Make the Hub's repository if need be, before anything expensive; returns its full name.

    Raises:
        UsageError: if the Hub refuses the token or the name, or cannot be reached.
    """
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return HfApi(token=args.hub_token).create_repo(name, exist_ok=True).repo_id
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


# ======================================================================================================================
# 11. Training
# ======================================================================================================================


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

    def __enter__(self) -> "StopSignals":
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
                again = "; a second ^C does not wait" if number == signal.SIGINT else ""
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


def memory_advice(args: Namespace) -> str:
    """The flags that would save memory and are not in use, those that cost least first."""
    flags = {
        "--gradient_checkpointing": not args.gradient_checkpointing,
        "--cache_latents": not args.cache_latents,
        "--train_batch_size=1 with --gradient_accumulation_steps": args.train_batch_size > 1,
        "--mixed_precision=bf16": args.mixed_precision not in ("bf16", "fp16"),
        "--use_8bit_adam": args.optimizer.lower() == "adamw" and not args.use_8bit_adam,
        "--full_bf16": not args.full_bf16,
        "--fused_backward_pass": not args.fused_backward_pass,
        "--optimizer=adafactor": args.optimizer.lower() != "adafactor",
        "--sample_batch_size=1": args.with_prior_preservation and args.sample_batch_size > 1,
        "a smaller --resolution": args.resolution > 512,
    }
    return ", ".join(flag for flag, helps in flags.items() if helps) or "a smaller --resolution"


@contextlib.contextmanager
def stage(args: Namespace, accelerator: Accelerator, name: str) -> Iterator[None]:
    """Announce a stage; when it ends, return freed memory to the device and log time and peak memory.

    Raises:
        RunError: if memory runs out in it, with what was in use and which flags would help.
    """
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
        advice = memory_advice(args)
        raise RunError(f"out of memory while: {name} ({used}; {reason}). Try, in order: {advice}") from error
    clear_device_cache(garbage_collection=True)
    memory = peak_memory(accelerator.device).items()
    peak = ", ".join(f"{key.replace('_', ' ')} {value:.2f} GiB" for key, value in memory)
    logger.info(f"{name}: {time.perf_counter() - start:.1f} s, {peak}")


def draw_normal(shape: torch.Size, seed: int, purpose: str, places: list[tuple]) -> Tensor:
    """Standard normal noise of `shape` for each of B places in the run: (B, *shape)."""
    return torch.stack([torch.randn(shape, generator=generator_for(seed, purpose, *place)) for place in places])


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a copy from page-locked memory does not wait for what the device is busy with."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def prepare_inputs(run: Run, batch: dict[str, Any], sigma_table: Tensor) -> dict[str, Any]:
    """Turn a micro-batch into the tensors of `training_loss`, on the device; a CLIP that is trained gets token ids."""
    args, data, seed = run.args, run.data, run.state.seed
    move, keys = functools.partial(to_device, device=run.accelerator.device), batch["keys"]
    halves = ("instance", "class")[: len(batch["prompts"]) // len(keys)]
    places = [(half, key.epoch, key.position) for half in halves for key in keys]
    if "latents" in batch:
        distribution = LatentDistribution(*map(move, batch["latents"]))
    else:
        distribution = encode_pixels(data.vae, move(batch["pixels"]))
    shape = distribution.mean.shape[1:]
    generators = [generator_for(seed, "sigma", *place) for place in places]
    shift = flow_shift(args.flow_shift, shape[-2] // 2 * (shape[-1] // 2), data.scheduler_config)
    scheme = (args.weighting_scheme, args.logit_mean, args.logit_std, args.mode_scale, shift)
    embeds = [data.prompts[prompt] for prompt in batch["prompts"]]
    pooled = "pooled_prompt_embeds" if run.trained.text_encoder is None else "clip_ids"
    transformer = unwrap(run.trained.transformer)
    return {
        "latents": sample_latents(
            distribution, move(draw_normal(shape, seed, "posterior", places)), data.shift_factor, data.scaling_factor
        ),
        "noise": move(draw_normal(shape, seed, "noise", places)),
        "sigmas": move(sample_sigmas(generators, sigma_table, *scheme)),
        "prompt_embeds": torch.stack([move(embed.prompt_embeds) for embed in embeds]),
        "pooled_prompt_embeds": torch.stack([move(getattr(embed, pooled)) for embed in embeds]),
        "guidance": make_guidance(transformer, args.guidance_scale, len(embeds), run.accelerator.device),
        "weights": move(batch["weights"]),
        "weighting_scheme": args.weighting_scheme,
        "prior_loss_weight": args.prior_loss_weight,
    }


def backward(run: Run, loss: Tensor) -> None:
    """The backward pass of a micro-batch; its `weights` make the mean over the step, and accelerate divides by both.

    Raises:
        RunError: with `--fused_backward_pass`, if the loss is not finite, before it reaches a weight.
    """
    if run.args.fused_backward_pass:
        check_finite(run, run.accelerator.reduce(loss.detach(), reduction="sum").item(), 0.0)
    run.accelerator.backward(loss * run.accelerator.gradient_accumulation_steps * run.accelerator.num_processes)


def clip_gradients(run: Run) -> Tensor | None:
    """Clip the norm of all gradients to `--max_grad_norm`, unless the backward pass clipped; returns what it was."""
    if run.args.fused_backward_pass:
        return run.trained.optimizer.optimizer.take_norm()  # type: ignore[attr-defined]
    return run.accelerator.clip_grad_norm_(run.trained.parameters, run.args.max_grad_norm or math.inf)


@contextlib.contextmanager
def accumulate(accelerator: Accelerator, models: list[nn.Module], last: bool) -> Iterator[None]:
    """Gradients are shared between processes, and the optimizer may step, only in the `last` micro-batch of a step.

    What is sharded is shared in each micro-batch: else a process would hold the whole gradient in between, 44 GiB.
    """
    accelerator.sync_gradients = last
    with contextlib.ExitStack() as stack:
        if not (last or is_sharded(accelerator)):
            for model in models:
                stack.enter_context(accelerator.no_sync(model))
        yield


def check_finite(run: Run, loss: float, norm: float) -> None:
    """See that a loss and the norm of its gradient are numbers.

    Raises:
        RunError: if not, before a checkpoint is written.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise RunError(
            f"the loss is {loss} at step {run.state.step}, its gradient's norm {norm}. Likely causes: --learning_rate "
            "too high, an fp16 overflow, or broken weights. Checkpoints written so far are good: resume from the last "
            "one with other flags"
        )


def log_step(run: Run, loss: float, grad_norm: Tensor | None, seconds: float) -> dict[str, float]:
    """Log what an optimizer step did: `loss` is its mean over micro-batches and processes."""
    check_finite(run, loss, 0.0 if grad_norm is None or run.accelerator.scaler else float(grad_norm))  # fp16 skips it
    values = {"loss": loss, "lr": run.trained.lr_scheduler.get_last_lr()[0], "step_time": seconds}
    if grad_norm is not None:
        values["grad_norm"] = float(grad_norm)
    group = run.trained.optimizer.param_groups[0]
    if "d" in group:  # Prodigy's estimate of the step size
        values["prodigy_d"] = float(group["d"])
    values |= peak_memory(run.accelerator.device)
    run.state.losses.append(loss)
    run.state.seconds += seconds
    run.accelerator.log(values, step=run.state.step)
    return values


class Progress:
    """The line by which a training is watched: redrawn on a terminal; in a log file, a new one every LOG_SECONDS."""

    def __init__(self, run: Run, schedule: MicroBatches) -> None:
        self.state, self.schedule, self.told = run.state, schedule, -math.inf
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
        if self.bar.disable and (step == last or time.monotonic() - self.told >= LOG_SECONDS):
            logger.info(text)
            self.told = time.monotonic()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.bar.close()


def stop_run(run: Run, number: int, saved: str) -> None:
    """Leave after `saved` was written because of signal `number`, which another process may have got."""
    step = run.state.step
    number = max(gather_object([number]))
    logger.warning(
        f"Stopped by {signal.Signals(number).name} at step {step}; {saved} is saved. "
        "To go on: the same command with --resume_from_checkpoint=latest"
    )
    run.accelerator.end_training()
    if launcher_is_gone():  # with it went torch's store, which the process may wait for at its end
        sys.stdout.flush()
        os._exit(128 + number)
    raise SystemExit(128 + number)


def train(run: Run, schedule: MicroBatches, signals: StopSignals) -> None:
    """The loop: from `state.step` to `schedule.last_step`, with validation and checkpoints on the way."""
    args, accelerator, trained, state = run.args, run.accelerator, run.trained, run.state
    loader = DataLoader(
        run.data.dataset,
        batch_sampler=schedule,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        generator=generator_for(state.seed, "loader"),
        worker_init_fn=ignore_signals,
    )
    sigma_table = load_scheduler(args).sigmas
    start, total = time.perf_counter(), torch.zeros(2, device=accelerator.device)  # loss, and who wants to stop
    progress = Progress(run, schedule)
    batches = ((batch["keys"][0], prepare_inputs(run, batch, sigma_table)) for batch in loader)
    upcoming = next(batches, None)
    while upcoming is not None:
        key, inputs = upcoming
        with accumulate(accelerator, trained.models, key.last):
            # What still draws from the global generator, dropout, is repeatable too.
            torch.manual_seed(generator_for(state.seed, "dropout", key.epoch, key.position).initial_seed())
            if trained.text_encoder is not None:
                inputs["pooled_prompt_embeds"] = pool_with_clip(trained.text_encoder, inputs["pooled_prompt_embeds"])
            loss = training_loss(trained.transformer, **inputs)
            backward(run, loss)
            total[0] += loss.detach()
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
        total[1] = signals.pending()
        step_loss, stop = accelerator.reduce(total, reduction="sum").tolist()
        values = log_step(run, step_loss, grad_norm, time.perf_counter() - start)
        progress.update(values)
        due = is_validation_due(args, state.step, schedule)
        state.owes_validation = due and stop > 0
        if stop or state.step % args.checkpointing_steps == 0:
            save_checkpoint(run)
        if stop:
            progress.close()
            stop_run(run, signals.pending(), f"checkpoint-{state.step}")
        if due:
            validate(run)
        total.zero_()
        start = time.perf_counter()
    progress.close()


def is_validation_due(args: Namespace, step: int, schedule: MicroBatches) -> bool:
    """Whether validation follows this step, as `--validation_steps` and `--validation_epochs` say."""
    epoch, left = divmod(step, schedule.steps_per_epoch)
    at_epoch = left == 0 and (epoch - 1) % args.validation_epochs == 0
    return at_epoch or bool(args.validation_steps and step % args.validation_steps == 0)


def validate(run: Run) -> None:
    """What `--validation_loss` and `--validation_prompt` ask for, from the live model or the average of its weights."""
    with run.trained.averaged():
        if run.args.validation_loss:
            log_validation_loss(run)
        if validation_prompts(run.args) and (run.state.step > 0 or run.args.validation_steps):
            draw_validation_pictures(run)


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
                InitProcessGroupKwargs(timeout=timedelta(hours=2))
            ],  # others wait for process 0's downloads
        )
    except (ValueError, ImportError) as error:
        raise UsageError(f"--mixed_precision={args.mixed_precision}, --report_to={args.report_to}: {error}") from error
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()  # the stages are announced
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
    if getattr(args, "full_bf16", False) and precision != "bf16":
        raise UsageError(f"--full_bf16 needs --mixed_precision=bf16, and accelerate's configuration says {precision}")
    for note in notes_on_args(args):
        logger.warning(note)
    set_up_engine(args, accelerator)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def engine_name(accelerator: Accelerator) -> str:
    """In which form a checkpoint holds the optimizer's state: a run on one process and DDP's have the same."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return "FSDP2" if accelerator.distributed_type == DistributedType.FSDP else "DDP"


def set_up_engine(args: Namespace, accelerator: Accelerator) -> None:
    """Tell FSDP2 or DeepSpeed what the flags say, with which accelerate's configuration knows nothing of.

    Raises:
        UsageError: for what the engine cannot do.
    """
    if is_sharded(accelerator):
        names = (
            "train_text_encoder", "base_quantization", "blocks_to_swap", "full_bf16", "fused_backward_pass", "use_ema",
        )  # fmt: skip
        asked = [f"--{name}" for name in names if getattr(args, name, None) not in (None, False, 0, "none")]
        if args.optimizer.lower() != "adamw":  # it would measure a shard where it means a tensor
            asked.append(f"--optimizer={args.optimizer}")
        if args.use_8bit_adam and accelerator.distributed_type == DistributedType.FSDP:  # knows no DTensor
            asked.append("--use_8bit_adam")
        if asked:
            raise UsageError(
                f"{', '.join(asked)}: not with {engine_name(accelerator)}, which shards one model and steps with plain "
                "AdamW; leave it out, or use accelerate_configs/ddp.yaml"
            )
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if not accelerator.is_fsdp2:
            raise UsageError("accelerate's configuration asks for FSDP1; set fsdp_version: 2 in fsdp_config")
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


def check_model(args: Namespace) -> None:
    """See that `--pretrained_model_name_or_path` is a FLUX.1 pipeline; only its index is read.

    Raises:
        UsageError: if it is not, or cannot be reached.
    """
    name = args.pretrained_model_name_or_path
    try:
        index = FluxPipeline.load_config(name, **hub_options(args))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--pretrained_model_name_or_path is {name!r}, which does not load: {reason}") from error
    if index.get("_class_name") != "FluxPipeline" or "transformer" not in index:
        raise UsageError(f"--pretrained_model_name_or_path is {name!r}, which is a {index.get('_class_name')}")


def list_pictures(args: Namespace) -> dict[str, list[Picture]]:
    """The pictures of the subject, those of the class that are there, and those held out.

    Raises:
        UsageError: if there are none, or some cannot be read.
    """
    captions = (args.instance_prompt, args.caption_extension, None if args.dataset_name else args.caption_column)
    pictures = {
        "instance": pictures_in_dataset(args)
        if args.dataset_name
        else pictures_in_folder("--instance_data_dir", args.instance_data_dir, *captions)
    }
    if args.validation_data_dir:
        pictures["validation"] = pictures_in_folder("--validation_data_dir", args.validation_data_dir, *captions)
    class_flag, folder = "--class_data_dir", args.class_data_dir
    if args.with_prior_preservation and os.path.lexists(folder) and open_folder(class_flag, folder):
        pictures["class"] = pictures_in_folder(class_flag, folder, args.class_prompt)
    checked = iter(check_pictures([picture for part in pictures.values() for picture in part]))
    pictures = {half: [next(checked) for _ in part] for half, part in pictures.items()}
    for name in ("instance_data_dir", "validation_data_dir"):
        if getattr(args, name) and (others := passed_over(Path(getattr(args, name)), args.caption_extension)):
            logger.warning(f"--{name} has what is not a picture by its name, so it is passed over: {shorten(others)}")
    for half, part in pictures.items():
        if half != "class" or not args.aspect_ratio_buckets:  # else each takes its instance picture's
            report_pictures(half, part, training_sizes(args))
    return pictures


def make_folders(args: Namespace, pictures: dict[str, list[Picture]]) -> str:
    """Make what will be written to: `--output_dir`, the folder of missing class pictures, and with `--push_to_hub` the
    repository; returns its name.

    Raises:
        UsageError: if one is refused; a folder made for nothing is removed.
    """
    wanted, made = {"--output_dir": Path(args.output_dir)}, list[Path]()
    if args.with_prior_preservation and len(pictures.get("class", [])) < args.num_class_images:
        wanted["--class_data_dir"] = Path(args.class_data_dir)
    try:
        for flag, folder in wanted.items():
            made += [path for path in (*folder.parents[::-1], folder) if not os.path.lexists(path)]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".probe{PARTIAL}"
                probe.touch()
                probe.unlink()
            except OSError as error:
                raise UsageError(f"{flag} is {str(folder)!r}, which cannot be written: {error}") from error
        return create_repository(args) if args.push_to_hub else Path(args.output_dir).resolve().name
    except UsageError:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def begin(args: Namespace, accelerator: Accelerator) -> tuple[dict[str, list[Picture]], Any, str]:
    """Everything that can go wrong before a model is loaded goes wrong here, on the main process first.

    Returns:
        The pictures; the checkpoint to resume and what it says of itself, or None; the repository's name.
    """
    found: list[Any] = [None, None]
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            check_model(args)
        pictures = list_pictures(args)
        if accelerator.is_main_process:
            if Path(args.output_dir).is_dir():
                lock_folder(Path(args.output_dir))
                remove_leftovers(Path(args.output_dir))
            resumed = find_checkpoint(args)
            if resumed is not None:
                check_fits(args, *resumed)
            found = [make_folders(args, pictures), resumed]
            lock_folder(Path(args.output_dir))
    repo_id, resumed = accelerate.utils.broadcast_object_list(found)
    check_machines(args, accelerator, resumed, pictures)
    return pictures, resumed, repo_id


def check_machines(args: Namespace, accelerator: Accelerator, resumed: Any, pictures: dict[str, list[Picture]]) -> None:
    """See that all machines have what they need: the same pictures, the checkpoint, and a shard's folder.

    Raises:
        UsageError: on all processes, naming what to share or copy.
    """
    probe = Path(args.output_dir) / f".probe-{random.SystemRandom().random()}{PARTIAL}"
    probe = accelerate.utils.broadcast_object_list([probe])[0]
    if accelerator.is_main_process:
        probe.touch()
    accelerator.wait_for_everyone()
    names = [(kind, picture.name, picture.prompt) for kind, part in pictures.items() for picture in part]
    checkpoint = resumed is None or (resumed[0] / STATE_FILE).is_file()
    pictures_of, checkpoint_of, folder_of = zip(*gather_object([(names, checkpoint, probe.exists())]), strict=True)
    if accelerator.is_main_process:
        probe.unlink()
    if any(others != names for others in pictures_of):
        raise UsageError("the machines have different pictures; copy the folders, or put them on a disk that all see")
    if not all(checkpoint_of):
        raise UsageError(f"{resumed[0]} is not on all machines; copy it, or put --output_dir on a disk that all see")
    if is_sharded(accelerator) and not all(folder_of):
        raise UsageError(
            f"--output_dir is {args.output_dir!r}, which not all machines share; {engine_name(accelerator)} writes "
            "its checkpoints from all of them: give a folder on a disk that all see"
        )


def start_state(args: Namespace, resumed: Any) -> RunState:
    """Where the run starts: at the checkpoint, or at step 0 with `--seed` or a seed that is drawn."""
    if resumed is not None:
        state = RunState(**resumed[1]["state"])
        if args.seed not in (None, state.seed):
            logger.warning(f"--seed={args.seed} has no effect: the run goes on with the checkpoint's {state.seed}")
        return state
    if args.seed is not None:
        return RunState(0, args.seed)
    seed = accelerate.utils.broadcast_object_list([random.SystemRandom().randrange(2**31)])[0]
    logger.info(f"No --seed: drew {seed}")
    return RunState(0, seed)


def fingerprint(pictures: dict[str, list[Picture]]) -> str:
    """How many pictures there are, and the CRC-32 of what is known of them."""
    known = {half: [(at.name, at.prompt, at.size, at.look) for at in part] for half, part in pictures.items()}
    return f"{sum(map(len, pictures.values()))} ({zlib.crc32(json.dumps(known).encode()):08x})"


def prepare_data(
    args: Namespace, accelerator: Accelerator, dataset: DreamBoothDataset, validation_pictures: list[Picture]
) -> TrainingData:
    """Encode prompts, and pictures if they are to be cached, and free what encoded them."""
    prompts = [*dataset.prompts, *(picture.prompt for picture in validation_pictures), *validation_prompts(args)]
    prompts = list(dict.fromkeys(prompts))
    with stage(args, accelerator, f"Encoding {len(prompts)} prompts"):
        encoded = encode_prompts(args, accelerator, prompts, weight_dtype(accelerator))
    with stage(args, accelerator, "Encoding the pictures" if args.cache_latents else "Loading the VAE"):
        vae = load_vae(args, accelerator)
        config = vae.config
        validation = encode_validation_pictures(args, accelerator, vae, validation_pictures)
        if args.cache_latents:
            cache_latents(accelerator, vae, dataset)
            vae = vae.to("cpu") if validation_prompts(args) else None
    facts = {
        "processes": accelerator.num_processes,
        "engine": engine_name(accelerator),
        "precision": accelerator.mixed_precision,
        "pictures": fingerprint(dataset.halves),
        "validation pictures": fingerprint({str(training_sizes(args)): validation_pictures}),
    }
    factors, scheduler_config = (config.shift_factor, config.scaling_factor), load_scheduler(args).config
    return TrainingData(dataset, encoded, vae, *factors, validation, facts, scheduler_config)


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision of what is frozen, by what accelerate resolved from flag, environment and configuration."""
    return PRECISIONS[accelerator.mixed_precision]


def prepare_training(args: Namespace, accelerator: Accelerator, seed: int, weights: Path | None) -> Trained:
    """Load what is trained, make its optimizer and schedule, and hand all of it to accelerate.

    `weights` is a checkpoint of which only the weights can be used, or None.
    """
    transformer = load_transformer(args, accelerator)
    text_encoder = load_text_encoder(args).to(accelerator.device) if args.train_text_encoder else None
    if weights is not None and accelerator.is_main_process:  # whose weights all start from
        for model in filter(None, (transformer, text_encoder)):
            load_weights(model, weights)
    if is_sharded(accelerator) and accelerator.mixed_precision != "no":  # accelerate does so for the others
        transformer.forward = torch.autocast(accelerator.device.type, weight_dtype(accelerator))(transformer.forward)
    compile_blocks(accelerator, transformer)
    optimizer = make_optimizer(args, parameter_groups(args, transformer, text_encoder), seed)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    if args.fused_backward_pass:  # its optimizer averages over processes itself, in place of DDP
        models = [model for model in (transformer, text_encoder) if model is not None]
        accelerator._models += [accelerator.prepare_model(model, evaluation_mode=True) for model in models]
        optimizer, lr_scheduler = accelerator.prepare(optimizer, lr_scheduler)
    else:
        transformer, optimizer, lr_scheduler = accelerator.prepare(transformer, optimizer, lr_scheduler)
        text_encoder = None if text_encoder is None else accelerator.prepare(text_encoder)
    register_state_hooks(accelerator)
    trained = Trained(transformer, text_encoder, optimizer, lr_scheduler)
    kinds = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained.parameters}))
    logger.info(f"Training {trained.size:,} parameters in {kinds} under mixed precision {accelerator.mixed_precision}")
    return trained


def optimizer_fits(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a checkpoint's optimizer state can be loaded: its engine is this one, and for ZeRO its processes too."""
    same = before.get("engine", now["engine"]) == now["engine"]
    return same and (before["processes"] == now["processes"] or not now["engine"].startswith("ZeRO"))


def go_on(run: Run, checkpoint: Path, facts: dict[str, Any], changes: list[str]) -> None:
    """Take the state of a checkpoint, which says `facts` of itself, as far as it fits; settings stay the flags'."""
    args, trained, data = run.args, run.trained, run.data
    fits = optimizer_fits(facts["data"], data.facts)
    if fits:
        # DeepSpeed's word, for the frozen are left out; the others load by way of the host, as some copy the state.
        options = {"load_module_strict": False} if is_sharded(run.accelerator) else {"map_location": "cpu"}
        with keep_options(trained.optimizer):
            run.accelerator.load_state(str(checkpoint), **options)
    else:
        trained.lr_scheduler.load_state_dict(torch.load(checkpoint / "scheduler.bin"))
    follow_flags(trained)
    measured = facts["data"].get("validation pictures", data.facts["validation pictures"])
    if not args.validation_loss:
        data.facts["validation pictures"] = measured
    elif measured != data.facts["validation pictures"]:
        run.state.untrained_loss = None
    if trained.ema is not None:  # which came back on the CPU, with the decay that it had
        trained.ema.to(run.accelerator.device)
        trained.ema.decay = args.ema_decay
    kept = "everything" if fits else "the weights and the schedule, not the optimizer's state"
    logger.info(f"Resuming from {checkpoint} at step {run.state.step} of {args.max_train_steps}, with {kept}")
    for change in changes:
        logger.warning(f"Changed since {checkpoint.name}, so this run is not the one it would have been: {change}")


def fit(args: Namespace, accelerator: Accelerator, data: TrainingData, resumed: Any, state: RunState) -> None:
    """Load, train, save: when this returns, the memory of the training is free."""
    checkpoint, facts = resumed or (None, {"data": data.facts})
    changes = [] if checkpoint is None else list(changes_since(args, facts, data.facts))
    with stage(args, accelerator, "Loading the transformer"):
        weights = None if optimizer_fits(facts["data"], data.facts) else checkpoint
        trained = prepare_training(args, accelerator, state.seed, weights)
        if args.use_ema:
            trained.ema = EMAModel([parameter.float() for parameter in trained.parameters], args.ema_decay)
            accelerator.register_for_checkpointing(trained.ema)
    run = Run(args, accelerator, data, trained, state)
    if checkpoint is not None:
        go_on(run, checkpoint, facts, changes)
    schedule = make_schedule(args, accelerator, data.dataset, state)
    if accelerator.is_main_process:
        own = checkpoint is not None and checkpoint.resolve().parent == Path(args.output_dir).resolve()
        (Path(args.output_dir) / RESULT_FILE).unlink(missing_ok=True)
        set_aside(args, state.step if own else 0, facts if own else None, changed=bool(changes))
    with StopSignals() as signals:
        with stage(args, accelerator, "Training"), logging_redirect_tqdm():
            if state.step == 0 or state.owes_validation:
                validate(run)
            train(run, schedule, signals)
        with stage(args, accelerator, "Saving the result"):
            dtype = torch.float32 if args.upcast_before_saving else weight_dtype(accelerator)
            partial = Path(args.output_dir) / f".results{PARTIAL}"
            with writing(args, "the result", partial, 4 * trained.size), trained.averaged():
                save_results(args, accelerator, trained, dtype)
        if any(gather_object([signals.pending()])):
            save_checkpoint(run)  # with which `latest` has only the pictures and the card to make
            stop_run(run, signals.pending(), f"the result and checkpoint-{state.step}")
    accelerator.free_memory()
    accelerator._custom_objects.clear()  # the average


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
    if args.scale_lr:
        args.learning_rate *= per_step
        logger.info(f"--scale_lr: the learning rate is {args.learning_rate} for {per_step} examples a step")
    logger.info(
        f"{len(dataset)} examples, {per_step} a step, {steps_per_epoch} steps an epoch, {args.max_train_steps} in all"
    )


def prepare_dataset(
    args: Namespace, accelerator: Accelerator, pictures: dict[str, list[Picture]], seed: int
) -> DreamBoothDataset:
    """The examples, after the class pictures that are missing were drawn."""
    class_pictures: list[Picture] = []
    if args.with_prior_preservation:
        if len(pictures.get("class", [])) < args.num_class_images:
            with stage(args, accelerator, "Generating class pictures"):
                generate_class_pictures(args, accelerator, seed)
        class_pictures = pictures_in_folder("--class_data_dir", args.class_data_dir, args.class_prompt)
    return DreamBoothDataset(pictures["instance"], class_pictures[: args.num_class_images], args, seed)


def start_trackers(args: Namespace, accelerator: Accelerator) -> None:
    """Begin what `--report_to` names, with all settings.

    Raises:
        UsageError: if it does not let the run in.
    """
    try:
        accelerator.init_trackers(PROJECT, config=plain_settings(args))
    except Exception as error:  # each tracker has its own kinds
        raise UsageError(
            f"--report_to={args.report_to} does not start: {error}. For wandb: `wandb login`, or WANDB_MODE=offline; "
            "or give --report_to=tensorboard or none"
        ) from error


def main(args: Namespace) -> None:
    """The story: pictures, prompts, latents, transformer, training, result, final pictures, card, Hub."""
    accelerator = make_accelerator(args)
    pictures, resumed, repo_id = begin(args, accelerator)
    state = start_state(args, resumed)
    dataset = prepare_dataset(args, accelerator, pictures, state.seed)
    resolve_steps(args, accelerator, dataset, state)
    if accelerate.utils.broadcast_object_list([is_finished(args)])[0]:
        logger.info(f"Nothing to do: all {args.max_train_steps} steps are done; raise --max_train_steps to go on")
        if args.push_to_hub and accelerator.is_main_process:
            push_to_hub(args, repo_id)
        return
    start_trackers(args, accelerator)
    validation_pictures = pictures.get("validation", pictures["instance"]) if args.validation_loss else []
    data = prepare_data(args, accelerator, dataset, validation_pictures)
    fit(args, accelerator, data, resumed, state)
    if validation_prompts(args) and not args.skip_final_inference:
        embeds = [data.prompts[prompt] for prompt in validation_prompts(args)]
        del data  # and with it the VAE: what was saved brings its own
        with stage(args, accelerator, "Drawing the final pictures"):
            draw_final_pictures(args, accelerator, embeds, state, weight_dtype(accelerator))
    if accelerator.is_main_process:
        with by_product("The model card"):
            write_model_card(args, repo_id, describe_training(args, accelerator, pictures, state), state)
            mark_finished(args)
        if args.push_to_hub:
            push_to_hub(args, repo_id)
    accelerator.end_training()
    logger.info(closing_summary(args, state))


if __name__ == "__main__":
    gc.freeze()  # the libraries' objects stay: each collection would spend 0.3 s on them
    try:
        main(parse_args())
    except (UsageError, RunError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except KeyboardInterrupt:
        print(f"{Path(__file__).name}: interrupted; checkpoints written so far are whole", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
