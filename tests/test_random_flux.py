"""The random checkpoint: it loads and draws, has FLUX.1's shapes, and is the same wherever it is written."""

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTokenizer, T5TokenizerFast

import random_flux

PROMPTS = [
    "a photo of sks dog",
    "a photo of sks dogs",
    "a photo of a sks dog",
    "a photo of dog sks",
    "a photo of sks cat",
    "sks",
    "sks!",
    "",
]


def load(folder: Path) -> FluxPipeline:
    return FluxPipeline.from_pretrained(folder).to("cpu")


def draw(pipeline: FluxPipeline, prompt: str = "a photo of sks dog", guidance: float = 3.5, **more: Any) -> np.ndarray:
    size: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 16}
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(prompt, guidance_scale=guidance, generator=generator, **size | more).images[0]
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def pipeline(tiny_flux: Path) -> FluxPipeline:
    return load(tiny_flux)


@pytest.fixture(scope="module")
def picture(pipeline: FluxPipeline) -> np.ndarray:
    return draw(pipeline)


def test_the_pipeline_draws_a_picture(picture: np.ndarray) -> None:
    assert picture.shape == (32, 48, 3)
    assert picture.std() > 5


def test_the_picture_depends_on_the_prompt(pipeline: FluxPipeline, picture: np.ndarray) -> None:
    assert np.abs(picture - draw(pipeline, "a cat")).max() > 0


def test_the_picture_depends_on_the_guidance_of_a_guided_model(pipeline: FluxPipeline, picture: np.ndarray) -> None:
    assert pipeline.transformer.config.guidance_embeds is True
    assert np.abs(picture - draw(pipeline, guidance=30.0)).max() > 0


def test_a_model_without_guidance_draws_without(tiny_schnell: Path) -> None:
    schnell = load(tiny_schnell)
    assert schnell.transformer.config.guidance_embeds is False
    assert not any("guidance" in name for name, _ in schnell.transformer.named_parameters())
    drawn = draw(schnell)
    assert drawn.shape == (32, 48, 3) and drawn.std() > 5
    assert np.array_equal(drawn, draw(schnell, guidance=30.0))


def test_the_schedulers_are_those_of_dev_and_schnell(pipeline: FluxPipeline, tiny_schnell: Path) -> None:
    dev, schnell = pipeline.scheduler.config, load(tiny_schnell).scheduler.config
    assert (dev.shift, dev.use_dynamic_shifting, dev.base_shift, dev.max_shift) == (3.0, True, 0.5, 1.15)
    assert (dev.base_image_seq_len, dev.max_image_seq_len, dev.num_train_timesteps) == (256, 4096, 1000)
    assert (schnell.shift, schnell.use_dynamic_shifting, schnell.num_train_timesteps) == (1.0, False, 1000)


@pytest.fixture(scope="module")
def dev_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, torch.dtype]]:
    """What would be written for `--size dev`: the models on the meta device and the precision, by folder."""
    models: dict[str, tuple[Any, torch.dtype]] = {}

    def keep(model: Any, folder: Path, stem: str, dtype: torch.dtype, seed: int, **_: Any) -> None:
        models[folder.name] = (model, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_flux, "write_model", keep)
        random_flux.write_checkpoint(tmp_path_factory.mktemp("dev"), size="dev")
    return models


# Counted in the published checkpoint.
@pytest.mark.parametrize(
    ("folder", "parameters"),
    [
        ("transformer", 11_901_408_320),
        ("vae", 83_819_683),
        ("text_encoder", 123_060_480),
        ("text_encoder_2", 4_762_310_656),
    ],
)
def test_the_dev_size_has_the_parameters_of_flux_1_dev(
    dev_models: dict[str, tuple[Any, torch.dtype]], folder: str, parameters: int
) -> None:
    model, dtype = dev_models[folder]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert dtype == torch.bfloat16
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_the_dev_size_has_the_blocks_of_flux_1_dev(dev_models: dict[str, tuple[Any, torch.dtype]]) -> None:
    transformer = dev_models["transformer"][0]
    for blocks, count, parameters in (
        (transformer.transformer_blocks, 19, 339_831_296),
        (transformer.single_transformer_blocks, 38, 141_591_808),
    ):
        assert [sum(weight.numel() for weight in block.parameters()) for block in blocks] == [parameters] * count
    shapes = {name: tuple(weight.shape) for name, weight in transformer.named_parameters()}
    assert shapes["x_embedder.weight"] == (3072, 64)
    assert shapes["context_embedder.weight"] == (3072, 4096)
    assert shapes["time_text_embed.text_embedder.linear_1.weight"] == (3072, 768)
    assert shapes["time_text_embed.guidance_embedder.linear_1.weight"] == (3072, 256)
    assert tuple(transformer.config.axes_dims_rope) == (16, 56, 56)


def test_the_schnell_shapes_lack_only_the_guidance_embedder() -> None:
    sizes: dict[str, Any] = random_flux.TRANSFORMER | {"num_layers": 1, "num_single_layers": 1}
    with torch.device("meta"):
        guided, plain = (FluxTransformer2DModel(**sizes, guidance_embeds=embeds) for embeds in (True, False))
    missing = dict(guided.named_parameters()).keys() - dict(plain.named_parameters()).keys()
    assert {name.split(".")[1] for name in missing} == {"guidance_embedder"}


def tiny_transformer() -> FluxTransformer2DModel:
    sizes: dict[str, Any] = random_flux.TRANSFORMER | random_flux.SIZES["tiny"]["transformer"]
    with torch.device("meta"):
        return FluxTransformer2DModel(**sizes, guidance_embeds=True)


def write(folder: Path, max_shard_size: str = "4GB", seed: int = 0) -> Path:
    stem = "diffusion_pytorch_model"
    random_flux.write_model(tiny_transformer(), folder, stem, torch.float32, seed, max_shard_size)
    return folder


def tensors_of(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dictionary


def test_no_shard_is_larger_than_asked(tmp_path: Path) -> None:
    files = sorted(write(tmp_path, max_shard_size="300KB").glob("*.safetensors"))
    sizes = [sum(tensor.numel() * 4 for tensor in tensors_of(file).values()) for file in files]
    assert len(files) > 3 and max(sizes) <= 300_000
    assert sum(sizes) == sum(weight.numel() * 4 for weight in tiny_transformer().parameters())


def test_the_index_of_the_shards_tells_where_each_tensor_lies(tmp_path: Path) -> None:
    write(tmp_path, max_shard_size="300KB")
    (index,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.index.json"))
    lies = {name: file.name for file in tmp_path.glob("*.safetensors") for name in tensors_of(file)}
    assert index["weight_map"] == lies
    assert lies.keys() == dict(tiny_transformer().named_parameters()).keys()
    assert index["metadata"]["total_size"] == sum(weight.numel() * 4 for weight in tiny_transformer().parameters())


def test_shards_load_as_the_model_that_one_file_holds(tmp_path: Path) -> None:
    whole, sharded = write(tmp_path / "whole"), write(tmp_path / "sharded", max_shard_size="300KB")
    assert not list(whole.glob("*.index.json"))
    first, second = (FluxTransformer2DModel.from_pretrained(folder).state_dict() for folder in (whole, sharded))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_weights_keep_the_size_of_what_passes_through(tmp_path: Path) -> None:
    model = FluxTransformer2DModel.from_pretrained(write(tmp_path))
    matrices = {name: weight for name, weight in model.named_parameters() if weight.ndim == 2 and weight.numel() > 4000}
    assert len(matrices) > 30
    for weight in matrices.values():
        assert abs(float(weight.detach().std()) * math.sqrt(weight.shape[1]) - 1) < 0.1
    assert all((weight == 0).all() for name, weight in model.named_parameters() if name.endswith("bias"))
    norms = [weight for name, weight in model.named_parameters() if weight.ndim == 1 and name.endswith("weight")]
    assert len(norms) > 10 and all((weight == 1).all() for weight in norms)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_writes_the_same_bytes(tiny_flux: Path, tmp_path: Path) -> None:
    torch.rand(3)  # what was drawn before does not matter
    assert digests(random_flux.write_checkpoint(tmp_path)) == digests(tiny_flux)


def test_another_seed_writes_other_weights_and_the_same_rest(tiny_flux: Path, tmp_path: Path) -> None:
    first, other = digests(tiny_flux), digests(random_flux.write_checkpoint(tmp_path, seed=1))
    assert first.keys() == other.keys()
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")}
    assert len(changed) == 4


def test_an_unknown_size_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'huge'.*tiny.*dev"):
        random_flux.write_checkpoint(tmp_path, size="huge")
    assert list(tmp_path.iterdir()) == []


def tokenizers(folder: Path) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return clip, T5TokenizerFast.from_pretrained(folder / "tokenizer_2")


@pytest.mark.parametrize("which", [0, 1], ids=["CLIP", "T5"])
def test_distinct_prompts_have_distinct_ids(tiny_flux: Path, which: int) -> None:
    tokenizer = tokenizers(tiny_flux)[which]
    ids = {
        prompt: tokenizer(prompt, padding="max_length", truncation=True, max_length=64).input_ids for prompt in PROMPTS
    }
    assert [pair for pair in itertools.combinations(PROMPTS, 2) if ids[pair[0]] == ids[pair[1]]] == []


def test_the_ids_lie_in_the_vocabularies_of_the_models(pipeline: FluxPipeline) -> None:
    for tokenizer, model in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        ids = tokenizer(["".join(map(chr, range(32, 127))), "é ü 漢 🐕"], padding=True).input_ids
        assert min(map(min, ids)) >= 0 and max(map(max, ids)) < model.config.vocab_size
        assert len(tokenizer) <= model.config.vocab_size


def test_t5_pads_ends_and_fails_with_its_published_ids(tiny_flux: Path) -> None:
    tokenizer = tokenizers(tiny_flux)[1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    ids = tokenizer("a 漢", padding="max_length", max_length=8).input_ids
    end = ids.index(1)
    assert ids[end:] == [1] + [0] * (7 - end)
    assert ids[end - 1] == 2 and not {0, 1, 2} & set(ids[: end - 1])


def test_t5_ids_tell_the_prompt(tiny_flux: Path) -> None:
    tokenizer = tokenizers(tiny_flux)[1]
    prompt = "A photo of sks dog, 3 times!"
    assert tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True) == prompt


def test_clip_starts_and_ends_a_prompt_with_its_highest_ids(tiny_flux: Path) -> None:
    tokenizer = tokenizers(tiny_flux)[0]
    ids = tokenizer("sks", padding="max_length").input_ids
    letters = tokenizer.convert_tokens_to_ids(["s", "k", "s</w>"])
    assert ids == [512, *letters, *[513] * 73]
    assert max(letters) < 512


@pytest.mark.parametrize(("which", "length"), [(0, 77), (1, 512)], ids=["CLIP", "T5"])
def test_long_prompts_are_cut_to_the_models_length(tiny_flux: Path, which: int, length: int) -> None:
    tokenizer = tokenizers(tiny_flux)[which]
    ids = tokenizer("sks dog " * 200, padding="max_length", truncation=True).input_ids
    assert tokenizer.model_max_length == len(ids) == length
    assert ids[-1] == tokenizer.eos_token_id
    assert len(tokenizer("sks", padding="max_length").input_ids) == length


def test_the_pooled_vector_is_read_where_the_prompt_ends(pipeline: FluxPipeline) -> None:
    ids = pipeline.tokenizer("sks dog", padding="max_length", return_tensors="pt").input_ids
    end = ids[0].tolist().index(513)
    with torch.no_grad():
        out = pipeline.text_encoder(ids)
    assert torch.equal(out.pooler_output[0], out.last_hidden_state[0, end])


def opened(paths: list[Path]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in paths]


def test_sample_pictures_lie_stand_and_are_square(tmp_path: Path) -> None:
    paths = random_flux.write_pictures(tmp_path)
    assert paths == sorted(tmp_path.iterdir())
    sizes = [image.size for image in opened(paths)]
    assert len(set(sizes)) == len(sizes) == 5
    assert {int(np.sign(width - height)) for width, height in sizes} == {-1, 0, 1}


def test_sample_pictures_scale(tmp_path: Path) -> None:
    small, large = (opened(random_flux.write_pictures(tmp_path / str(scale), scale=scale)) for scale in (1, 3))
    assert [image.size for image in large] == [(3 * image.width, 3 * image.height) for image in small]


def test_sample_pictures_show_one_dog_in_different_scenes(tmp_path: Path) -> None:
    images = opened(random_flux.write_pictures(tmp_path, count=10))
    assert len({image.tobytes() for image in images}) == 10
    for image in images:
        pixels = np.asarray(image).reshape(-1, 3)
        dog = [(pixels == colour).all(1).mean() for colour in ((139, 69, 19), (210, 105, 30))]  # body and head
        assert min(dog) > 0.01
    assert len({image.getpixel((0, 0)) for image in images[:5]}) == 5


def test_the_command_writes_what_its_flags_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--no_guidance_embeds", "--seed", "5", "--pictures", str(tmp_path / "pictures")]
    monkeypatch.setattr("sys.argv", ["random_flux.py", str(tmp_path / "flux"), *flags])
    random_flux.main()
    wanted = random_flux.write_checkpoint(tmp_path / "wanted", guidance_embeds=False, seed=5)
    assert digests(tmp_path / "flux") == digests(wanted)
    assert len(opened(sorted((tmp_path / "pictures").iterdir()))) == 5
    assert str(tmp_path / "flux") in capsys.readouterr().out
