"""What a simulated GPU showed: overflows, waiting, copies and casts that cost and give nothing."""

import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

import train_dreambooth_flux as full
import train_dreambooth_lora_flux as lora
from conftest import Run, both_scripts, one_script

pytestmark = one_script


def make_inputs(script: ModuleType, args: Any, transformer: Any, dtype: torch.dtype) -> Any:
    """A picture of 32 px with six text tokens."""
    generator, config, one = torch.Generator().manual_seed(0), transformer.config, torch.ones(1)
    latents, noise = (torch.randn(1, 16, 4, 4, generator=generator) for _ in range(2))
    text = torch.randn(1, 6, config.joint_attention_dim, generator=generator).to(dtype)
    pooled = torch.randn(1, config.pooled_projection_dim, generator=generator).to(dtype)
    return script.StepInputs(latents, noise, one * 0.5, text, pooled, loss_weights=one, options=args)


def load(script: ModuleType, flags: list[str]) -> tuple[Any, Any]:
    """The flags, and the transformer as it is trained."""
    args = script.parse_args(flags)
    seed = [0] if script is lora else []
    return args, script.load_transformer(args, script.make_accelerator(args), *seed)


def test_int8_in_float16_does_not_overflow_where_its_result_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(2048, 64)
    layer.weight.data = torch.randn(64, 2048, generator=generator) * 0.03
    x = torch.randn(32, 2048, generator=generator) * 60
    exact = layer(x)
    assert 200 < exact.abs().max() < 1000 and (layer.weight / layer.weight.abs().amax() * 127 @ x.T).abs().max() > 65504
    layer.bias.data = layer.bias.half()
    half = x.half().requires_grad_()
    found = lora.QuantizedLinear(layer, "int8", torch.device("cpu"))(half)
    assert found.dtype == torch.float16 and torch.isfinite(found).all()
    assert (found.float() - exact).norm() / exact.norm() < 0.02
    found.sum().backward()
    assert half.grad is not None
    expected = layer.weight.sum(0).expand_as(half)
    assert (half.grad.float() - expected).norm() / expected.norm() < 0.05


def test_the_allocator_grows_its_segments_unless_the_user_says_otherwise(script: ModuleType) -> None:
    text = Path(script.__file__ or "").read_text()
    code = text[text.index("for library in") : text.index("\nimport accelerate")]
    for given, wanted in (({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "backend:x"}, "backend:x"),
                          ({"PYTORCH_CUDA_ALLOC_CONF": "backend:y"}, None)):  # fmt: skip
        environment = dict(given)
        modules = {"os": SimpleNamespace(environ=environment), "sys": SimpleNamespace(platform="linux")}
        exec(code, modules | {"logging": logging})
        assert environment.get("PYTORCH_ALLOC_CONF") == wanted
    assert os.environ.get("PYTORCH_ALLOC_CONF") == "expandable_segments:True" or sys.platform != "linux"


def test_an_8_bit_step_does_not_wait_after_each_weight(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []
    run(full, "--use_8bit_adam", "--max_train_steps=1")
    import bitsandbytes.optim.optimizer as library

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *given: waits.append(given))
    library.sync_gpu(SimpleNamespace(device=SimpleNamespace(type="cuda")))
    assert waits == []


@both_scripts
def test_between_products_everything_is_in_half_precision_and_no_cast_of_a_weight_is_kept(
    script: ModuleType, base_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast CUDA's norms would write float32; kept casts of FLUX.1 [dev]'s float32 weights are 22 GiB."""
    args, transformer = load(script, [*base_flags, "--mixed_precision=bf16"])
    found, keeps = set[tuple[torch.dtype, bool]](), set[bool]()

    def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found.add((output.dtype, torch.is_autocast_enabled("cpu")))

    for module in transformer.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GELU)):
            module.register_forward_hook(record)
    linear = nn.functional.linear

    def watch(*given: Any) -> Tensor:
        keeps.add(torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
        return linear(*given)

    monkeypatch.setattr(nn.functional, "linear", watch)
    script.training_loss(transformer, make_inputs(script, args, transformer, torch.bfloat16))["loss"].backward()
    assert found == {(torch.bfloat16, False)} and keeps == {False}
    assert {weight.dtype for weight in transformer.parameters() if weight.requires_grad} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_queries_and_keys_are_as_exact_as_their_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 64, generator=generator) * 5 + 1).to(dtype)
    norm = nn.RMSNorm(64, eps=1e-6)
    norm.weight.data = torch.rand(64, generator=generator)
    found, exact = full.normalize(norm, x), norm(x.float())
    assert found.dtype == dtype
    assert (found.float() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@both_scripts
def test_blocks_that_are_recomputed_run_twice_and_train_the_same(script: ModuleType, base_flags: list[str]) -> None:
    gradients, forwards = [], []
    for chosen in ([], ["--gradient_checkpointing"]):
        (args, transformer), calls = load(script, [*base_flags, *chosen]), list[nn.Module]()
        assert isinstance(transformer, FluxTransformer2DModel)
        blocks: Any = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        for block in blocks:
            block.register_forward_pre_hook(lambda block, _, calls=calls: calls.append(block))
        script.training_loss(transformer, make_inputs(script, args, transformer, torch.float32))["loss"].backward()
        gradients.append([parameter.grad for parameter in transformer.parameters() if parameter.grad is not None])
        forwards.append(len(calls))
    assert forwards == [len(blocks), 2 * len(blocks)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True)) and len(gradients[0]) > 20
