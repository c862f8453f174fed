"""A training command on a simulated GPU: the script's own `main` at FLUX.1 [dev]'s size, on a CPU and without weights.

    python -m benchmarks.simulate train_dreambooth_lora_flux.py --mixed_precision=bf16 --gradient_checkpointing \
        --cache_latents --train_batch_size=1 --rank=16

prints what each stage holds on the device, and of the last step: how often the host waits for the device and where,
kernels, operations and bytes by precision, and how long cards would take at the least. The flags of the model and the
pictures have defaults here; the simulation's own flags (--model, --steps, --card) come before the script.

Real are shapes, dtypes, devices, storages, autograd, and CUDA's rules of autocast: tensors are torch's fake ones, on a
CUDA device that a small library makes the CPU build of torch believe in. Not real are kernels, what these need beside
their results, and numbers: a number that is read is 1 or 0. Seconds are a roofline with assumed efficiencies, so only
their ratios count; copies of swapped blocks are in them, one after the other. Needs g++ and torch 2.13's CPU build.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import weakref
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "false", "TOKENIZERS_PARALLELISM": "false"}

import bitsandbytes.nn  # before there is a device to find
import bitsandbytes.optim.optimizer
import numpy as np
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

import random_flux
from tools.memory_plan import load_script, make_fake, rms_norm

GIB = 1024**3
PAGE = 2 * 2**20  # by which a segment of the allocator grows
HALF = (torch.bfloat16, torch.float16)
WHOLE = (torch.float32, torch.float64, torch.complex64)
COMPONENTS = {FluxTransformer2DModel: "transformer", AutoencoderKL: "vae", CLIPTextModel: "text_encoder",
              T5EncoderModel: "text_encoder_2"}  # fmt: skip


@dataclass
class Card:
    """Peaks by the data sheet: products a second in bf16 (summed in float32) and in float32, bytes a second."""

    name: str
    half: float
    full: float
    bandwidth: float
    bus: float  # bytes a second from the host and to it: PCIe with 16 lanes
    memory: float  # GiB
    capability: tuple[int, int]


CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", 989e12, 67e12, 3.35e12, 64e9, 79.1, (9, 0)),
    "4090": Card("NVIDIA GeForce RTX 4090", 165e12, 82e12, 1.008e12, 32e9, 23.5, (8, 9)),
}
EFFICIENCY = {"product": 0.65, "attention": 0.5, "memory": 0.8, "bus": 0.8}  # of these peaks: assumed
SHORTEST = 2e-6  # seconds of a kernel: assumed

LIBRARY = r"""
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
const c10::Device device{c10::DeviceType::CUDA, 0};
struct OneDevice final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};
struct OneGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return device; }
  c10::Device exchangeDevice(c10::Device) const override { return device; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
}  // namespace
extern "C" bool install() {
  static OneGuard guard;
  c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard);
  // torch has asked for its hooks by now and keeps the object: that object gets the virtual functions of this class.
  *(void**)&at::detail::getCUDAHooks() = *(void**)new OneDevice();
  return at::detail::getCUDAHooks().hasCUDA();
}
"""


def install_library() -> None:
    """Compile the library, once for each build of torch, and load it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = cache / f"flux-simulated-device-{torch.__version__}.so"
    cache.mkdir(exist_ok=True)
    if not library.exists():
        root = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory() as folder:
            source, made = Path(folder) / "device.cpp", Path(folder) / "device.so"
            source.write_text(LIBRARY)
            options = ["-std=c++20", "-fPIC", "-shared", f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
            subprocess.run(["g++", str(source), "-o", str(made), *options], check=True)
            partial = library.with_suffix(f".{os.getpid()}")
            partial.write_bytes(made.read_bytes())
            partial.replace(library)
    install = ctypes.CDLL(str(library)).install
    install.restype = ctypes.c_bool
    if not install():
        raise RuntimeError("this build of torch does not believe in the simulated device; it needs 2.13's CPU build")


class Segment:
    """The addresses of a stream as CUDA's allocator with expandable segments hands them out: best fit, else grow."""

    def __init__(self) -> None:
        self.free: dict[int, int] = {}  # offset: size
        self.end = self.mapped = 0

    def take(self, size: int) -> int:
        fitting = [(room, offset) for offset, room in self.free.items() if room >= size]
        if fitting:
            room, offset = min(fitting)
            del self.free[offset]
        else:  # the free block at the end grows
            offset = next((offset for offset, room in self.free.items() if offset + room == self.end), self.end)
            room = self.free.pop(offset, 0)
            self.end = offset + size
            self.mapped = max(self.mapped, -(-self.end // PAGE) * PAGE)
        if room > size:
            self.free[offset + size] = room - size
        return offset

    def give(self, offset: int, size: int) -> None:
        size += self.free.pop(offset + size, 0)
        for before, room in self.free.items():
            if before + room == offset:
                self.free[before] += size
                return
        self.free[offset] = size

    def trim(self) -> None:
        for offset, room in list(self.free.items()):
            if offset + room == self.end:
                del self.free[offset]
                self.end = offset
        self.mapped = -(-self.end // PAGE) * PAGE


@dataclass
class Counts:
    """What was done since the last reset."""

    kernels: int = 0
    waits: Counter = field(default_factory=Counter)  # where the host waits for the device
    float32_products: Counter = field(default_factory=Counter)  # matrix products in float32, and where
    bytes: Counter = field(default_factory=Counter)  # moved by kernels, "float32" or "half"
    operations: Counter = field(default_factory=Counter)  # of products and attention, by precision
    seconds: Counter = field(default_factory=Counter)  # at the least, by card


READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")  # of which the host waits for the result
NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "resize_",
    "set_",
    "device",
    "_unsafe_view",
    "lift_fresh",
}
LIBRARIES = (
    "train_dreambooth",
    "diffusers/",
    "peft/",
    "transformers/models",
    "bitsandbytes/",
    "accelerate/",
    "prodigy",
)


def where() -> str:
    """The innermost two lines of the scripts or of the libraries that they use."""
    frame, found = sys._getframe(2), list[str]()
    while frame is not None and len(found) < 2:
        path = frame.f_code.co_filename
        if any(part in path for part in LIBRARIES):
            found.append(f"{Path(path).name}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found) or "autograd"


class Device(TorchDispatchMode):
    """Follows every operation: what it makes on the device and what it does there."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.segments = (
            Counts(),
            {True: Segment(), False: Segment()},
        )  # those of small blocks and of others
        self.now = self.peak = self.pinned_now = self.pinned_peak = 0
        self.alive: set[int] = set()  # storages
        self.pinned: set[int] = set()
        self.busy = False  # whether anything was started since the last wait

    @property
    def reserved(self) -> int:
        return sum(segment.mapped for segment in self.segments.values())

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != "cuda" or storage._cdata in self.alive or not storage.nbytes():
            return
        size = -(-storage.nbytes() // 512) * 512
        segment = self.segments[size <= 2**20]
        self.alive.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, storage._cdata, size, segment, segment.take(size))

    def remove(self, number: int, size: int, segment: Segment, offset: int) -> None:
        self.alive.discard(number)
        self.now -= size
        segment.give(offset, size)

    def wait(self, reason: str) -> None:
        """The host waits until the device has nothing left to do; not counted where that is so already."""
        if self.busy:
            self.counts.waits[f"{reason} at {where()}"] += 1
        self.busy = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        used = any(leaf.device.type == "cuda" for leaf in inputs)
        if name in READS and used:
            self.wait(name)
        if name == "_local_scalar_dense":
            return 1.0 if inputs[0].is_floating_point() else used and inputs[0].dtype == torch.bool
        if name in ("equal", "is_nonzero"):
            return True
        result = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in results:
            self.add(tensor)
        if name in ("_to_copy", "copy_"):
            source, target = (inputs[0], results[0]) if name == "_to_copy" else (inputs[1], inputs[0])
            asked = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            kinds = (source.device.type, target.device.type)
            scalar = name == "copy_" and not source.dim() and kinds == ("cpu", "cuda")
            pageable = "cpu" in kinds and source.untyped_storage()._cdata not in self.pinned
            if kinds[0] != kinds[1] and not scalar and (not asked or pageable):
                self.wait(f"copy {kinds[0]} to {kinds[1]}")
        if (used or any(leaf.device.type == "cuda" for leaf in results)) and not func.is_view and name not in NO_KERNEL:
            self.count(func, name, args, kwargs, inputs, results, result)
        return result

    def pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.pinned.add(storage._cdata)
        self.pinned_now += storage.nbytes()
        self.pinned_peak = max(self.pinned_peak, self.pinned_now)
        weakref.finalize(storage, self.unpin, storage._cdata, storage.nbytes())
        return tensor

    def unpin(self, number: int, size: int) -> None:
        self.pinned.discard(number)
        self.pinned_now -= size

    def count(
        self, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], results: list[Tensor], result: Any
    ) -> None:
        """Add a kernel: its bytes are those of its operands, each once; an expanded side is read once."""
        data = 0
        for tensor in {id(leaf): leaf for leaf in [*inputs, *results]}.values():
            sides = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
            data += tensor.itemsize * int(np.prod(sides, dtype=np.int64))
        formula = flop_registry.get(func._overloadpacket)
        operations = formula(*args, **kwargs, out_val=result) if formula else 0
        dtypes = [leaf.dtype for leaf in inputs if leaf.is_floating_point()]
        kind = "attention" if "scaled_dot" in name else "product" if operations else "memory"
        crosses = any(leaf.dim() and leaf.device.type == "cpu" for leaf in [*inputs, *results])
        full = bool(operations) and torch.float32 in dtypes and "scaled_dot" not in name
        if full:
            shapes = " x ".join(str(tuple(leaf.shape)) for leaf in inputs)
            self.counts.float32_products[f"{name} {shapes} at {where()}"] += 1
        for key, card in CARDS.items():
            products = operations / ((card.full if full else card.half) * EFFICIENCY.get(kind, 1.0))
            memory = data / (card.bandwidth * EFFICIENCY["memory"])
            if crosses:  # `data` are both sides
                memory = data / 2 / (card.bus * EFFICIENCY["bus"])
            self.counts.seconds[key] += max(products, memory, SHORTEST)
            self.counts.seconds[f"{key}, memory"] += memory if kind == "memory" else 0.0
        self.busy = True
        self.counts.kernels += 1
        self.counts.operations["float32" if full else "half"] += operations
        whole = any(leaf.dtype in WHOLE for leaf in [*inputs, *results])
        self.counts.bytes["bus" if crosses else "float32" if whole else "half"] += data // (2 if crosses else 1)


DEVICE = Device()


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any = None, dropout: float = 0.0, causal: bool = False,
           scale: float | None = None, **_: Any) -> Tensor:  # fmt: skip
    """The kernel that CUDA would take: flash attention in half precision, else the memory-efficient one."""
    if query.device.type != "cuda":
        return SDPA(query, key, value, mask, dropout, causal, scale=scale)
    parts: Any = (query, key, value)
    if torch.is_autocast_enabled("cuda"):
        parts = [part.to(torch.get_autocast_dtype("cuda")) for part in parts]
    if mask is None and parts[0].dtype in HALF:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(*parts, dropout, causal, False, scale=scale)[0]
    if mask is not None:
        mask = parts[0].new_zeros(*query.shape[:3], key.shape[2])
    keep = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(*parts, mask, keep, dropout, causal, scale=scale)[0]


SDPA = nn.functional.scaled_dot_product_attention


def apply_to_module(self: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` as it treats real tensors; fake ones it would swap, which weak references forbid."""
    for child in self.children() if recurse else ():
        child._apply(change)
    for parameter in self._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                parameter.data = change(parameter)
    for name, buffer in self._buffers.items():
        self._buffers[name] = None if buffer is None else change(buffer)
    return self


def fake_numbers(self: Tensor) -> Any:
    """`tolist` of the loss and of whether somebody wants to stop: 1, then zeros."""
    if not isinstance(self, FakeTensor) or self.dim() != 1:
        return TOLIST(self)
    if self.device.type == "cuda":
        DEVICE.wait("tolist")
    return [1.0, *[0.0] * (len(self) - 1)]


def fake_array(self: Tensor, **options: Any) -> np.ndarray:
    return np.zeros(tuple(self.shape), str(self.dtype)[6:]) if isinstance(self, FakeTensor) else NUMPY(self, **options)


TOLIST, NUMPY, RANDINT = FakeTensor.tolist, Tensor.numpy, torch.randint


def pretend(card: Card) -> None:
    """Make torch say of its one device what a torch with a GPU says."""
    properties = SimpleNamespace(
        name=card.name, major=card.capability[0], minor=card.capability[1], total_memory=int(card.memory * GIB),
        multi_processor_count=132, warp_size=32, gcnArchName="",
    )  # fmt: skip

    def reset_peak(*_: Any) -> None:
        DEVICE.peak = DEVICE.now

    def empty_cache() -> None:
        for segment in DEVICE.segments.values():
            segment.trim()

    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True, "init": None,
        "_lazy_init": None, "set_device": None, "get_device_properties": properties, "get_device_name": card.name,
        "get_device_capability": card.capability, "is_bf16_supported": True, "manual_seed": None,
        "manual_seed_all": None, "device": contextlib.nullcontext(),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.max_memory_allocated = lambda *_: DEVICE.peak
    torch.cuda.mem_get_info = lambda *_: (int(card.memory * GIB) - DEVICE.now, int(card.memory * GIB))  # type: ignore
    torch.cuda.reset_peak_memory_stats = reset_peak
    torch.cuda.synchronize = lambda *_: DEVICE.wait("synchronize")
    torch.cuda.empty_cache = torch.cuda.memory.empty_cache = empty_cache
    FakeTensorMode.avoid_device_init = property(lambda _: True)  # type: ignore

    data = Tensor.data

    def set_data(self: Any, value: Tensor) -> None:
        data.__set__(self, value)
        if isinstance(value, FakeTensor):
            self.fake_device = value.fake_device  # else it would keep that of its old data

    FakeTensor.data = property(data.__get__, set_data)  # type: ignore
    Tensor.pin_memory = lambda self, *_: DEVICE.pin(self.clone())  # type: ignore
    Tensor.is_pinned = lambda self, *_: self.untyped_storage()._cdata in DEVICE.pinned  # type: ignore
    Tensor.numpy, FakeTensor.tolist = fake_array, fake_numbers  # type: ignore
    nn.Module._apply = apply_to_module  # type: ignore
    nn.functional.rms_norm = rms_norm
    nn.functional.scaled_dot_product_attention = attend
    bitsandbytes.nn.Params4bit = lambda packed, requires_grad, **_: nn.Parameter(packed, requires_grad)  # type: ignore
    torch.autograd.set_multithreading_enabled(False)


def loader(size: str, folder: Path) -> Callable[..., Any]:
    """In place of a script's `from_base`: models without weights, all else from `folder`."""

    def load(kind: Any, args: Namespace, subfolder: str = "", **options: Any) -> Any:
        if kind is FluxPipeline:  # of the text encoders alone
            parts = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel,
                     "tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}  # fmt: skip
            loaded = {name: load(part, args, name, **options) for name, part in parts.items()}
            return FluxPipeline(scheduler=None, vae=None, transformer=None, **loaded)
        if kind in COMPONENTS:
            device = (options.get("device_map") or {"": "cpu"})[""]
            with unset_fake_temporarily():
                model = random_flux.make_meta_models(size)[COMPONENTS[kind]]
            return make_fake(model, options.get("dtype", torch.float32), device)
        with unset_fake_temporarily():
            return kind.from_pretrained(folder, subfolder=subfolder)

    return load


def write_inputs(folder: Path) -> None:
    """What is small of a checkpoint, and two pictures."""
    random_flux.clip_tokenizer().save_pretrained(folder / "tokenizer")
    random_flux.t5_tokenizer().save_pretrained(folder / "tokenizer_2")
    FlowMatchEulerDiscreteScheduler(**random_flux.SCHEDULER).save_pretrained(folder / "scheduler")
    random_flux.write_pictures(folder / "pictures", count=2, scale=8)


@dataclass
class Stage:
    """Peaks of a stage, and what is left when it has ended, in GiB."""

    peak: float
    reserved: float
    left: float
    waits: int


def simulate(script: ModuleType, flags: list[str], size: str = "dev", steps: int = 2) -> dict[str, Any]:
    """Run a script's `main` on the simulated device, which `pretend` has set up.

    Returns:
        "stages": a Stage by name; "left": GiB of the device at the end; "step": the Counts of the last step; "pinned":
        GiB of page-locked host memory.
    """
    stages, taken = dict[str, Stage](), list[Counts]()
    DEVICE.pinned_peak = DEVICE.pinned_now
    whole_stage, log_step, cut_epoch = script.stage, script.log_step, script.MicroBatches.cut_epoch

    @contextlib.contextmanager
    def stage(accelerator: Any, name: str) -> Iterator[None]:
        DEVICE.counts = Counts()
        with whole_stage(accelerator, name):
            yield
            most = DEVICE.reserved
            peak = DEVICE.peak
        waits = sum(DEVICE.counts.waits.values())
        stages[name] = Stage(peak / GIB, most / GIB, DEVICE.now / GIB, waits)

    def log(*values: Any) -> Any:
        taken.append(DEVICE.counts)
        logged = log_step(*values)
        DEVICE.counts = Counts()
        return logged

    def cut(self: Any, epoch: int) -> Any:  # by numbers that are real
        with _disable_current_modes():
            return cut_epoch(self, epoch)

    def randint(*given: Any, **options: Any) -> Any:  # so are crops, and the steps with a prior
        if "device" in options:
            return RANDINT(*given, **options)
        with _disable_current_modes():
            return int(RANDINT(*given, **options))

    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_inputs(folder)
        base = {
            "pretrained_model_name_or_path": folder, "instance_data_dir": folder / "pictures", "seed": 0,
            "instance_prompt": "a photo of sks dog", "output_dir": folder / "out", "report_to": "none",
            "guidance_scale": 1, "max_train_steps": steps,
        }  # fmt: skip
        args = script.parse_args([*(f"--{key}={value}" for key, value in base.items()), *flags])
        args.skip_final_inference = True  # what was saved is not written
        changes = {
            "stage": stage, "log_step": log, "from_base": loader(size, folder), "check_model": lambda _: None,
            "save_result": lambda _: None, "write_model_card": lambda *_: None,
        }  # fmt: skip
        before = {key: getattr(script, key) for key in changes}
        for key, value in changes.items():
            setattr(script, key, value)
        script.MicroBatches.cut_epoch = cut
        stack.callback(vars(script).update, before)
        stack.callback(setattr, script.MicroBatches, "cut_epoch", cut_epoch)
        torch.randint = randint
        stack.callback(setattr, torch, "randint", RANDINT)
        AcceleratorState._reset_state(reset_partial_state=True)
        with FakeTensorMode(allow_non_fake_inputs=True), DEVICE:
            script.main(args)
    gc.collect()
    return {"stages": stages, "left": DEVICE.now / GIB, "step": taken[-1], "pinned": DEVICE.pinned_peak / GIB}


def report(found: dict[str, Any]) -> str:
    """The result of `simulate` as a text."""
    lines = [
        "Simulated: no kernel ran. GiB of the device: at the most, reserved by the allocator, left after the stage"
    ]
    for name, stage in found["stages"].items():
        lines.append(f"  {name:32s} {stage.peak:8.2f} {stage.reserved:8.2f} {stage.left:8.2f}  {stage.waits} waits")
    step: Counts = found["step"]
    if found["pinned"]:
        lines.append(f"  page-locked host memory: {found['pinned']:.2f}")
    tera = ", ".join(f"{kind} {count / 1e12:.1f}" for kind, count in step.operations.items() if count)
    giga = ", ".join(f"{kind} {count / 1e9:.1f}" for kind, count in step.bytes.items())
    lines.append(f"The last step: {step.kernels} kernels; {tera} TFLOP; {giga} GB moved")
    lines.append("  seconds at the least: " + ", ".join(f"{name} {value:.3f}" for name, value in step.seconds.items()))
    for title, places in (("waits", step.waits), ("products in float32", step.float32_products)):
        lines.append(f"  {title}: {sum(places.values())}")
        lines += [f"    {count:6d} x {place}" for place, count in places.most_common(10)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dev", choices=list(random_flux.SIZES), help="size (default: dev)")
    parser.add_argument("--card", default="h100", choices=list(CARDS), help="what the device says it is")
    parser.add_argument("--steps", type=int, default=2, help="(default: 2; the last one is reported)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("script", help="train_dreambooth_flux.py or train_dreambooth_lora_flux.py")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="the flags of the training")
    args = parser.parse_args()
    script = load_script(args.script)
    install_library()
    pretend(CARDS[args.card])
    logging.disable(logging.WARNING)
    found = simulate(script, args.flags, args.model, args.steps)
    if args.json:
        stages = {name: asdict(stage) for name, stage in found["stages"].items()}
        print(json.dumps(found | {"stages": stages, "step": vars(found["step"])}))
    else:
        print(report(found))


if __name__ == "__main__":
    main()
