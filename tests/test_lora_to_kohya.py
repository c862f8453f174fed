"""The converter to kohya's names: what a converted file adds to the weights is what the LoRA adds in diffusers."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.lora_to_kohya import convert, main

RANK, DIM = 2, 8
DOUBLE, SINGLE, CLIP = "transformer_blocks.0", "single_transformer_blocks.1", "encoder.layers.0"
SIZES = {  # some layers of diffusers: inputs, outputs, layer of kohya, first row there, all rows there
    f"{DOUBLE}.attn.to_q": (DIM, DIM, "double_blocks_0_img_attn_qkv", 0, 3 * DIM),
    f"{DOUBLE}.attn.to_k": (DIM, DIM, "double_blocks_0_img_attn_qkv", DIM, 3 * DIM),
    f"{DOUBLE}.attn.to_v": (DIM, DIM, "double_blocks_0_img_attn_qkv", 2 * DIM, 3 * DIM),
    f"{DOUBLE}.ff.net.2": (4 * DIM, DIM, "double_blocks_0_img_mlp_2", 0, DIM),
    f"{SINGLE}.attn.to_q": (DIM, DIM, "single_blocks_1_linear1", 0, 7 * DIM),
    f"{SINGLE}.attn.to_k": (DIM, DIM, "single_blocks_1_linear1", DIM, 7 * DIM),
    f"{SINGLE}.attn.to_v": (DIM, DIM, "single_blocks_1_linear1", 2 * DIM, 7 * DIM),
    f"{SINGLE}.proj_mlp": (DIM, 4 * DIM, "single_blocks_1_linear1", 3 * DIM, 7 * DIM),
    f"{SINGLE}.proj_out": (5 * DIM, DIM, "single_blocks_1_linear2", 0, DIM),
    "x_embedder": (16, DIM, "img_in", 0, DIM),
    "time_text_embed.timestep_embedder.linear_2": (DIM, DIM, "time_in_out_layer", 0, DIM),
}
CLIP_LAYERS = {
    f"{CLIP}.self_attn.q_proj": "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    f"{CLIP}.mlp.fc1": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
}
PLAIN = {"r": RANK, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}


def random_lora(layers: list[str], dtype: torch.dtype = torch.float32, ranks: dict[str, int] | None = None) -> Any:
    """Adapters for `layers` as `FluxPipeline.save_lora_weights` takes them: "<layer>.lora_A.weight" (rank, in)…"""
    generator, lora = torch.Generator().manual_seed(0), {}
    for layer in layers:
        inputs, outputs = SIZES.get(layer, (DIM, DIM))[:2]
        rank = (ranks or {}).get(layer, RANK)
        lora[f"{layer}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator).to(dtype)
        lora[f"{layer}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator).to(dtype)
    return lora


def kohya_delta(state: dict[str, Tensor], name: str) -> Tensor:
    """What ComfyUI and kohya's scripts add to a weight: alpha / rank times up times down, (out, in)."""
    up, down = (state[f"{name}.lora_{part}.weight"].float() for part in ("up", "down"))
    return state[f"{name}.alpha"] / down.shape[0] * (up @ down)


def check(state: dict[str, Tensor], lora: dict[str, Tensor], scales: dict[str, float], rtol: float = 1e-5) -> None:
    """Every row of kohya's layers is the product of the adapter that it came from, or zero."""
    expected: dict[str, Tensor] = {}
    for layer, scale in scales.items():
        inputs, outputs, name, start, rows = SIZES[layer]
        whole = expected.setdefault(f"lora_unet_{name}", torch.zeros(rows, inputs))
        product = lora[f"{layer}.lora_B.weight"].float() @ lora[f"{layer}.lora_A.weight"].float()
        whole[start : start + outputs] = scale * product
    assert {key.split(".")[0] for key in state} == set(expected) and len(state) == 3 * len(expected)
    for name, delta in expected.items():
        torch.testing.assert_close(kohya_delta(state, name), delta, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8 / math.sqrt(RANK)), (None, 1.0)])
@pytest.mark.parametrize("layers", [list(SIZES), [f"{DOUBLE}.attn.to_v"], [f"{SINGLE}.proj_mlp"]], ids=len)
def test_kohyas_file_adds_the_same_to_the_weights(
    rslora: bool | None, scale: float, layers: list[str], tmp_path: Path
) -> None:
    lora, metadata = random_lora(layers), None if rslora is None else PLAIN | {"use_rslora": rslora}
    FluxPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=lora, transformer_lora_adapter_metadata=metadata, weight_name="a.safetensors"
    )
    main([str(tmp_path / "a.safetensors")])
    check(load_file(tmp_path / "a_kohya.safetensors"), lora, dict.fromkeys(layers, scale))


def test_ranks_and_alphas_of_single_layers_count() -> None:
    """As peft reads its patterns: the end of a layer's name, or the whole of it after ^."""
    layers = [f"{SINGLE}.attn.to_q", f"{SINGLE}.attn.to_v", f"{DOUBLE}.attn.to_v", f"{DOUBLE}.ff.net.2"]
    lora = random_lora(layers, ranks={f"{SINGLE}.attn.to_q": 4})
    patterns = {f"^{DOUBLE}.attn.to_v": 6, "ff.net.2": 10, "to_q": 16}
    metadata = PLAIN | {"rank_pattern": {f"{SINGLE}.attn.to_q": 4}, "alpha_pattern": patterns}
    metadata = {f"transformer.{key}": value for key, value in metadata.items()}
    state = convert({f"transformer.{key}": tensor for key, tensor in lora.items()}, metadata)
    check(state, lora, dict(zip(layers, (16 / 4, 8 / RANK, 6 / RANK, 10 / RANK), strict=True)))


def test_alpha_keys_count_and_weights_keep_their_dtype() -> None:
    layers = [f"{SINGLE}.attn.to_q", f"{SINGLE}.proj_mlp", f"{SINGLE}.proj_out"]
    lora, scales = random_lora(layers, torch.bfloat16, {layers[1]: 5}), (0.5, 3.0, 1.0)
    state = {f"transformer.{key}": tensor for key, tensor in lora.items()}
    state[f"transformer.{layers[0]}.alpha"] = torch.tensor(0.5 * RANK)
    state[f"transformer.{layers[1]}.alpha"] = torch.tensor(3.0 * 5)
    converted = convert(state)
    assert {tensor.dtype for key, tensor in converted.items() if "lora_" in key.split(".")[1]} == {torch.bfloat16}
    check(converted, lora, dict(zip(layers, scales, strict=True)), rtol=0.02)


@pytest.mark.parametrize(("prefix", "settings"), [("", PLAIN), ("text_model.", None)], ids=["metadata", "plain"])
def test_clips_layers_get_kohyas_names(prefix: str, settings: dict[str, Any] | None, tmp_path: Path) -> None:
    clip, name = random_lora(list(CLIP_LAYERS)), "a.safetensors"
    options = {"text_encoder_lora_layers": {prefix + key: tensor for key, tensor in clip.items()}}
    FluxPipeline.save_lora_weights(tmp_path, **options, text_encoder_lora_adapter_metadata=settings, weight_name=name)
    main([str(tmp_path / "a.safetensors"), str(tmp_path / "k.safetensors")])
    state = load_file(tmp_path / "k.safetensors")
    assert len(state) == 3 * len(CLIP_LAYERS)
    for layer, name in CLIP_LAYERS.items():
        product = clip[f"{layer}.lora_B.weight"] @ clip[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(kohya_delta(state, name), product * (4 if settings else 1))


def test_the_names_of_older_versions_of_diffusers_are_read() -> None:
    down, up = torch.randn(RANK, DIM), torch.randn(DIM, RANK)
    for layer, old in (
        (f"transformer.{DOUBLE}.attn.to_out.0", f"transformer.{DOUBLE}.attn.processor.to_out_lora"),
        (f"text_encoder.{CLIP}.self_attn.q_proj", f"text_encoder.text_model.{CLIP}.self_attn.to_q_lora"),
        (f"text_encoder.{CLIP}.mlp.fc1", f"text_encoder.text_model.{CLIP}.mlp.fc1.lora_linear_layer"),
    ):
        expected = convert({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up})
        state = convert({f"{old}.down.weight": down, f"{old}.up.weight": up})
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def test_diffusers_own_reader_of_kohyas_format_gives_the_adapters_back() -> None:
    """At FLUX.1 [dev]'s sizes, which that reader takes for granted."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    generator, layers = torch.Generator().manual_seed(0), {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "_blocks." in path:
            layers[f"transformer.{path}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator)
            layers[f"transformer.{path}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator)
    assert len(layers) == 2 * (14 + 6)
    back = _convert_kohya_flux_lora_to_diffusers(convert(layers, {"transformer.lora_alpha": 1}))
    assert back.keys() == layers.keys()
    for name in (name for name in layers if "lora_A" in name):  # a product with a vector, which is cheap
        x, up = torch.randn(layers[name].shape[1], generator=generator), name.replace("lora_A", "lora_B")
        expected = layers[up] @ (layers[name] @ x) / 2
        torch.testing.assert_close(back[up] @ (back[name] @ x), expected, rtol=1e-3, atol=1e-3)


def test_what_kohya_has_no_name_for_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    lora = {f"transformer.{key}": tensor for key, tensor in random_lora(["proj_out", f"{DOUBLE}.ff.net.2"]).items()}
    lora["text_encoder_2.a"] = torch.zeros(1)
    with caplog.at_level(logging.WARNING):
        state = convert(lora)
    assert len(state) == 3 and len(caplog.messages) == 1
    assert caplog.messages[0].endswith("transformer.proj_out, text_encoder_2.a")


LAYER = f"transformer.{DOUBLE}.attn.to_q"
GOOD = {f"{LAYER}.lora_A.weight": torch.ones(RANK, DIM), f"{LAYER}.lora_B.weight": torch.ones(DIM, RANK)}


def test_what_cannot_be_converted_is_refused() -> None:
    for more, message in (
        ({f"{LAYER}.lora_magnitude_vector": torch.ones(DIM)}, "magnitude of DoRA, for which kohya's format"),
        ({f"{LAYER}.lora_B.bias": torch.ones(DIM)}, "is a bias, for which kohya's format"),
        ({f"{LAYER}.lora_B.weight": torch.ones(DIM, 3)}, "the file is damaged"),
        ({f"{LAYER}.lora_B.weight": torch.ones(5, RANK)}, r"\(8, 5\) inputs and outputs, not \(8, 8\)"),
        ({f"{LAYER}.alpha": torch.tensor(1.0)}, "beside the metadata's"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(GOOD | more, {"transformer.lora_alpha": 4})
    with pytest.raises(ValueError, match=r"no layer of FLUX.1 .*'lora_unet_img_in"):
        convert({"lora_unet_img_in.lora_down.weight": torch.ones(RANK, DIM)})


def test_errors_are_one_line_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, broken = tmp_path / "a.safetensors", tmp_path / "broken.safetensors"
    save_file(GOOD, source)
    broken.write_bytes(source.read_bytes()[:-9])
    (tmp_path / "link.safetensors").hardlink_to(source)
    for name, settings in (("other", {"num_attention_heads": 2, "attention_head_dim": DIM}), ("empty", {})):
        (tmp_path / name / "transformer").mkdir(parents=True)
        (tmp_path / name / "transformer" / "config.json").write_text(json.dumps(settings))
    cases = {
        (str(tmp_path / "gone.safetensors"),): "gone.safetensors is not a file; give the",
        (str(broken),): "broken.safetensors is damaged",
        (str(source), str(tmp_path / "link.safetensors")): "not overwritten; give another OUTPUT",
        (str(source), str(tmp_path / "no" / "k.safetensors")): "No such file",
        (str(source), str(tmp_path / "other")): "Is a directory",
        (str(source), "--base", str(tmp_path / "other")): "(8, 8) inputs and outputs, not (16, 16)",
        (str(source), "--base", str(tmp_path / "empty")): "not the configuration of a FLUX.1 transformer",
    }
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for arguments, message in cases.items():
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1, error
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
