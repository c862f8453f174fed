"""What a simulated GPU showed: overflows, waiting, copies and casts that cost and give nothing."""

import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import FluxPosEmbed, apply_rotary_emb
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import train_dreambooth_flux as full
import train_dreambooth_lora_flux as lora
from conftest import Run, both_scripts, one_script
from tools.memory_plan import PeakMemory

pytestmark = one_script

CPU = torch.device("cpu")


def test_int8_in_float16_does_not_overflow_where_its_result_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(2048, 64)
    layer.weight.data = torch.randn(64, 2048, generator=generator) * 0.03
    x = torch.randn(32, 2048, generator=generator) * 60
    exact = layer(x)
    assert 200 < exact.abs().max() < 1000 and (layer.weight / layer.weight.abs().amax() * 127 @ x.T).abs().max() > 65504
    half = x.half().requires_grad_()
    found = lora.QuantizedLinear(layer, "int8", CPU)(half)
    assert found.dtype == torch.float16 and torch.isfinite(found).all()
    assert (found.float() - exact).norm() / exact.norm() < 0.02
    found.sum().backward()
    assert half.grad is not None
    expected = layer.weight.sum(0).expand_as(half)
    assert (half.grad.float() - expected).norm() / expected.norm() < 0.05


def test_int8_with_a_bias_rounds_once() -> None:
    """The scale and the bias go in one pass, so that a bf16 result is as near to the exact one as bf16 can be."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 32)
    quantized = lora.QuantizedLinear(layer, "int8", CPU)
    x = torch.randn(16, 64, generator=generator).bfloat16()
    unpacked = quantized.weight.float() * quantized.scale[:, None]
    product = (x.float() @ quantized.weight.float().T).bfloat16().float()
    expected = (product * quantized.scale.bfloat16().float() + quantized.bias.bfloat16().float()).bfloat16()
    assert torch.equal(quantized(x), expected)
    assert (quantized(x).float() - (x.float() @ unpacked.T + layer.bias)).abs().max() < 0.02


def test_a_backward_pass_that_does_not_compile_is_said_and_the_run_goes_on(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    losses: list[float] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, step: losses.append(values["loss"]))
    run(script, f"--output_dir={tmp_path / 'eager'}")

    def fail(graph: Any, inputs: Any) -> None:
        raise RuntimeError("no compiler for this")

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=fail)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend=backend))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    torch._dynamo.reset()
    run(script)
    assert caplog.text.count("so the blocks run uncompiled: ") == 1 and "no compiler for this" in caplog.text
    assert losses[:2] == losses[2:]


@pytest.mark.parametrize("flags", [[], ["--full_bf16", "--mixed_precision=bf16"]], ids=["float32", "bf16"])
def test_an_average_takes_one_float32_copy_while_it_is_built(
    run: Run, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    peaks: list[int] = []
    prepare = full.EMAModel

    class Watched(prepare):  # type: ignore[misc, valid-type]
        def __init__(self, *given: Any, **more: Any) -> None:
            self.memory = PeakMemory()
            self.memory.__enter__()
            super().__init__(*given, **more)

    def register(self: Accelerator, ema: Any) -> None:
        ema.memory.__exit__(None, None, None)
        peaks.append(ema.memory.peak)
        assert {weight.dtype for weight in ema.shadow_params} == {torch.float32}
        copies = sum(weight.nbytes for weight in ema.shadow_params)
        peaks.append(copies + copies // (2 if flags else 1))  # and the weights themselves, which it reads

    monkeypatch.setattr(full, "EMAModel", Watched)
    monkeypatch.setattr(Accelerator, "register_for_checkpointing", register)
    run(full, "--use_ema", "--max_train_steps=1", *flags)
    assert 0.99 * peaks[1] < peaks[0] < 1.01 * peaks[1]


def test_the_allocator_grows_its_segments_unless_the_user_says_otherwise(script: ModuleType) -> None:
    text = Path(script.__file__ or "").read_text()
    code = text[text.index("for library in") : text.index("\nimport accelerate")]
    for given, wanted in (({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "backend:x"}, "backend:x"),
                          ({"PYTORCH_CUDA_ALLOC_CONF": "backend:y"}, None)):  # fmt: skip
        environment = dict(given)
        exec(
            code,
            {"os": SimpleNamespace(environ=environment), "sys": SimpleNamespace(platform="linux"), "logging": logging},
        )
        assert environment.get("PYTORCH_ALLOC_CONF") == wanted
    assert os.environ.get("PYTORCH_ALLOC_CONF") == "expandable_segments:True" or sys.platform != "linux"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotary_embedding_is_diffusers_with_fewer_kernels(script: ModuleType, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[0, row, column] for row in range(6) for column in range(4)])
    positions = FluxPosEmbed(10000, [16, 56, 56])
    frequencies = positions(ids)
    positions.register_forward_hook(script.add_rotations)
    x, gradient = (torch.randn(2, 24, 3, 128, generator=generator).to(dtype) for _ in range(2))
    results: dict[str, list[Tensor]] = {}
    for name, rotate in {"ours": script.rotate, "theirs": apply_rotary_emb, "exact": apply_rotary_emb}.items():
        given = (x.double() if name == "exact" else x).clone().requires_grad_()
        rotated = rotate(given, positions(ids) if name == "ours" else frequencies, sequence_dim=1)
        rotated.backward(gradient.to(rotated.dtype))
        assert given.grad is not None and rotated.dtype == given.dtype
        results[name] = [rotated.detach(), given.grad]
    for ours, theirs, exact in zip(*results.values(), strict=True):
        assert (ours - exact).norm() <= (theirs - exact).norm() < 4e-3 * exact.norm()
        assert dtype != torch.float32 or torch.equal(ours, theirs)


def test_an_8_bit_step_does_not_wait_for_the_device_after_each_weight(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[Any] = []
    run(script, "--use_8bit_adam", "--max_train_steps=1")
    import bitsandbytes.optim.optimizer as library

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *given: waits.append(given))
    library.sync_gpu(SimpleNamespace(device=SimpleNamespace(type="cuda")))
    assert waits == []


def test_processes_do_not_send_each_other_what_is_the_same_everywhere(
    script: ModuleType, base_flags: list[str]
) -> None:
    accelerator = script.make_accelerator(script.parse_args(base_flags))
    assert accelerator.ddp_handler.broadcast_buffers is False


@pytest.mark.parametrize("count", [2, 3, 4])
def test_swapped_blocks_are_fetched_ahead_where_the_direction_turns_too(
    count: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[tuple[int, bool, int]] = []
    load = lora.BlockSwap.load

    def record(self: Any, number: int, *hook: Any) -> None:
        ahead = number in self.copies
        load(self, number, *hook)
        loads.append((number, ahead, len(self.copies)))

    monkeypatch.setattr(lora.BlockSwap, "load", record)
    run(lora, f"--blocks_to_swap={count}", "--gradient_checkpointing", "--max_train_steps=3")
    assert len(loads) == 3 * 2 * count
    assert [number for number, _, _ in loads[: 2 * count]] == [*range(count), *reversed(range(count))]
    assert [ahead for _, ahead, _ in loads] == [False] + [True] * (len(loads) - 1)
    assert {waiting for *_, waiting in loads} == {1}  # one block on its way, never more


def test_host_memory_that_cannot_be_pinned_is_named_by_its_flag(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def refuse(*size: Any, **options: Any) -> Tensor:
        if "pin_memory" in options and options.get("dtype") is torch.uint8:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(lora.RunError, match=r"Loading the transformer.*--blocks_to_swap could not pin host memory"):
        run(lora, "--blocks_to_swap=2", "--gradient_checkpointing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_keep_the_precision_of_their_input_and_are_as_exact_as_it_is(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 64, generator=generator) * 5 + 1).to(dtype)
    norms = [nn.LayerNorm(64, eps=1e-6, elementwise_affine=False), nn.LayerNorm(64), nn.RMSNorm(64, eps=1e-6)]
    for norm in norms:
        for parameter in norm.parameters():
            parameter.data = torch.rand(64, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = lora.normalize(norm, x)
        exact = norm(x.float())
        assert found.dtype == dtype
        assert (found.float() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_adapters_get_the_same_gradients_without_casting_their_inputs(
    run: Run, monkeypatch: pytest.MonkeyPatch, tiny_flux: Path, base_flags: list[str]
) -> None:
    gradients = []
    for casts in (True, False):
        args = lora.parse_args([*base_flags, "--mixed_precision=bf16"])
        model = FluxTransformer2DModel.from_pretrained(tiny_flux, subfolder="transformer", torch_dtype=torch.bfloat16)
        lora.add_adapter(args, model.requires_grad_(False), lora.TRANSFORMER_TARGETS, 0)
        layers = [module for module in model.modules() if isinstance(module, lora.BaseTunerLayer)]
        assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)
        for layer in layers:
            layer.cast_input_dtype_enabled = casts
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        inputs = (torch.randn(1, 16, 4, 4, generator=generator), torch.tensor([0.5]))
        text = (torch.randn(1, 5, 32, generator=generator), torch.randn(1, 32, generator=generator), torch.ones(1))
        with torch.autocast("cpu", torch.bfloat16):
            lora.predict_velocity(model, *inputs, *text).float().square().mean().backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@both_scripts
@pytest.mark.parametrize("count", [None, 0, 1, 3])
def test_blocks_that_are_not_recomputed_run_once_and_train_the_same(
    script: ModuleType, tiny_flux: Path, count: int | None
) -> None:
    """Of the tiny model's blocks: their forwards in a step, and gradients, against those without checkpointing."""
    gradients, forwards = [], []
    for chosen in (
        [],
        ["--gradient_checkpointing"] + ([] if count is None else [f"--gradient_checkpointing_blocks={count}"]),
    ):
        flags = ["--pretrained_model_name_or_path=x", "--instance_data_dir=y", "--instance_prompt=z", *chosen]
        args, calls = script.parse_args(flags), list[nn.Module]()
        transformer = FluxTransformer2DModel.from_pretrained(tiny_flux, subfolder="transformer").train()
        script.set_up_blocks(args, transformer)
        blocks = script.list_blocks(transformer)
        for block in blocks:
            block.register_forward_pre_hook(lambda block, _, calls=calls: calls.append(block))
        generator, config = torch.Generator().manual_seed(0), transformer.config
        latents, noise = (torch.randn(1, 16, 4, 4, generator=generator) for _ in range(2))
        text = torch.randn(1, 6, config.joint_attention_dim, generator=generator)
        pooled = torch.randn(1, config.pooled_projection_dim, generator=generator)
        one = torch.ones(1)
        inputs = script.StepInputs(latents, noise, one * 0.5, text, pooled, one, one, args)
        script.training_loss(transformer, inputs).backward()
        gradients.append([parameter.grad for parameter in transformer.parameters() if parameter.grad is not None])
        forwards.append(len(calls))
    assert forwards == [len(blocks), len(blocks) + (len(blocks) if count is None else count)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True)) and len(gradients[0]) > 50


def test_more_blocks_than_there_are_cannot_be_recomputed(script: ModuleType, run: Run) -> None:
    with pytest.raises(script.UsageError, match="--gradient_checkpointing_blocks is 99; this transformer has"):
        run(script, "--gradient_checkpointing", "--gradient_checkpointing_blocks=99")


def test_autocast_keeps_no_copies_of_weights(script: ModuleType, base_flags: list[str]) -> None:
    """Each weight is cast once a forward; kept, the casts of FLUX.1 [dev]'s float32 weights are 22 GiB."""
    accelerator = script.make_accelerator(script.parse_args([*base_flags, "--mixed_precision=bf16"]))
    kept = []
    linear = nn.Linear(4, 4)
    linear.forward = lambda x, plain=linear.forward: (plain(x), kept.append(torch.is_autocast_cache_enabled()))[0]
    accelerator.prepare(linear)(torch.zeros(1, 4))
    assert kept == [False]


@pytest.mark.parametrize(
    ("mode", "taken"),
    [("max-autotune", "max-autotune-no-cudagraphs"), ("reduce-overhead", "default"), ("default", "default")],
)
def test_blocks_are_not_compiled_into_cuda_graphs(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, mode: str, taken: str
) -> None:
    """Where the next block's output would overwrite the last one's."""
    given: list[Any] = []
    monkeypatch.setattr(
        torch, "compile", lambda forward, **options: given.append(options.get("mode", "default")) or forward
    )
    plugin = TorchDynamoPlugin(backend="inductor", mode=mode)
    transformer = SimpleNamespace(transformer_blocks=[nn.Linear(1, 1)], single_transformer_blocks=[nn.Linear(1, 1)])
    script.compile_blocks(SimpleNamespace(state=SimpleNamespace(dynamo_plugin=plugin)), transformer)
    assert given == [taken, taken]


def test_attention_in_half_precision_only_is_refused_in_float32(
    script: ModuleType, base_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.Accelerator, "device", torch.device("cuda"))
    args = script.parse_args([*base_flags, "--mixed_precision=no", "--attention_backend=_native_flash"])
    with pytest.raises(
        script.UsageError, match="--attention_backend=_native_flash needs --mixed_precision=bf16 or fp16"
    ):
        script.make_accelerator(args)
