"""Precision follows what accelerate resolved, memory follows the stages, and a run that diverges stops."""

import functools
import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.models.autoencoders.vae import Decoder, Encoder
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

import train_dreambooth_flux as full
from conftest import SCRIPTS, Run, one_script

LORA_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(params=["flag", "environment"])
def bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a bf16 run, which is chosen by a flag or by what `accelerate config` and the launcher set."""
    if request.param == "flag":
        return ["--mixed_precision=bf16"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    return []


def spy(monkeypatch: pytest.MonkeyPatch, script: ModuleType, name: str, look: Callable[..., Any]) -> None:
    """Have `look` called with the arguments of each call of a script's function, before it runs."""
    function = getattr(script, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        look(*args, **kwargs)
        return function(*args, **kwargs)

    monkeypatch.setattr(script, name, call)


def all_parameters(trained: Any) -> dict[str, nn.Parameter]:
    """Of the transformer and of CLIP, if it is trained."""
    models = enumerate(trained.models)
    return {f"{number}.{name}": value for number, model in models for name, value in model.named_parameters()}


def saved_tensors(output: Path, component: str) -> dict[str, Tensor]:
    """What was trained of a component, as it was saved."""
    if (output / LORA_FILE).exists():
        return {name: value for name, value in load_file(output / LORA_FILE).items() if name.startswith(component)}
    return {
        name: value for file in (output / component).glob("*.safetensors") for name, value in load_file(file).items()
    }


def test_what_is_trained_and_its_optimizer_state_are_float32_in_a_bf16_run(
    script: ModuleType, run: Run, bf16: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    spy(monkeypatch, script, "save_results", lambda args, accelerator, trained, dtype: found.append(trained))
    run(script, *bf16, "--train_text_encoder")
    [trained] = found
    states = [value for state in trained.optimizer.state.values() for value in state.values() if value.ndim > 0]
    assert {parameter.dtype for parameter in trained.parameters} == {torch.float32}
    assert {state.dtype for state in states} == {torch.float32}
    assert len(states) == 2 * len(trained.parameters)
    wanting = {name for name, parameter in all_parameters(trained).items() if parameter.requires_grad}
    assert len(wanting) == len(trained.parameters)


def test_what_is_frozen_has_the_precision_of_the_run(
    script: ModuleType, run: Run, bf16: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, nn.Parameter]] = []
    spy(
        monkeypatch, script, "save_results", lambda args, accelerator, trained, _: found.append(all_parameters(trained))
    )
    run(script, *bf16, "--train_text_encoder")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    run(script, "--mixed_precision=no", "--train_text_encoder")
    for parameters, dtype in zip(found, (torch.bfloat16, torch.float32), strict=True):
        frozen = {name: value.dtype for name, value in parameters.items() if not value.requires_grad}
        assert set(frozen.values()) == ({dtype} if "lora" in script.__name__ else set())
        assert all("lora" in name for name in parameters.keys() - frozen.keys()) == ("lora" in script.__name__)


def test_a_bf16_run_computes_in_bf16_from_float32_latents_and_sigmas(
    script: ModuleType, run: Run, bf16: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, computed = set[torch.dtype](), set[torch.dtype]()

    def look(transformer: Any, inputs: Any) -> None:
        names = ("latents", "noise", "sigmas", "guidance", "loss_weights")
        given.update(getattr(inputs, name).dtype for name in names)
        transformer.proj_out.register_forward_hook(lambda module, arguments, output: computed.add(output.dtype))

    spy(monkeypatch, script, "training_loss", look)
    run(script, *bf16)
    assert given == {torch.float32}
    assert computed == {torch.bfloat16}


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (["--mixed_precision=bf16"], torch.bfloat16),
        (["--mixed_precision=bf16", "--upcast_before_saving"], torch.float32),
        (["--mixed_precision=no"], torch.float32),
    ],
    ids=["bf16", "upcast", "float32"],
)
def test_the_result_is_saved_in_the_precision_of_the_training_unless_upcast(
    script: ModuleType, run: Run, flags: list[str], dtype: torch.dtype
) -> None:
    output = run(script, *flags, "--train_text_encoder")
    for component in ("transformer", "text_encoder"):
        assert {tensor.dtype for tensor in saved_tensors(output, component).values()} == {dtype}


def test_a_checkpoint_is_float32_in_a_bf16_run(script: ModuleType, run: Run, bf16: list[str]) -> None:
    output = run(script, *bf16, "--train_text_encoder", "--checkpointing_steps=2")
    for component in ("transformer", "text_encoder"):
        tensors = saved_tensors(output / "checkpoint-2", component)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_validation_leaves_the_live_model_as_it_is(
    script: ModuleType, run: Run, bf16: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, during, validations = list[Any](), set[tuple[int, torch.dtype]](), list[Any]()
    prepare_training, validate = script.prepare_training, script.validate

    def prepare(*args: Any) -> Any:
        live.append(prepare_training(*args))
        return live[0]

    def places() -> set[tuple[int, torch.dtype]]:
        return {(value.data_ptr(), value.dtype) for value in all_parameters(live[0]).values()}

    def modes() -> list[bool]:
        return [module.training for model in live[0].models for module in model.modules()]

    def check(*args: Any) -> None:
        before = places(), modes(), {name: value.detach().clone() for name, value in all_parameters(live[0]).items()}
        hook = live[0].transformer.proj_out.register_forward_pre_hook(lambda *_: during.update(places()))
        validate(*args)
        hook.remove()
        assert during == before[0]
        assert (places(), modes()) == before[:2]
        assert all(torch.equal(value, before[2][name]) for name, value in all_parameters(live[0]).items())
        validations.append(args)

    monkeypatch.setattr(script, "prepare_training", prepare)
    monkeypatch.setattr(script, "validate", check)
    monkeypatch.setattr(script, "VALIDATION_SIGMAS", 1)  # in place of 8: of each part of a validation there is one
    flags = ["--train_text_encoder", "--validation_prompt=a dog", "--validation_loss", "--validation_epochs=1"]
    run(script, *bf16, *flags, "--train_batch_size=5")
    assert len(validations) >= 2


@one_script
def test_the_validation_loss_does_not_depend_on_chance(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, validation_loss = list[tuple[float, float]](), script.validation_loss

    def compute_twice(*args: Any) -> float:
        torch.manual_seed(1)
        first: float = validation_loss(*args)
        torch.manual_seed(2)
        pairs.append((first, validation_loss(*args)))
        return first

    monkeypatch.setattr(script, "validation_loss", compute_twice)
    monkeypatch.setattr(script, "VALIDATION_SIGMAS", 2)
    flags = ["--lora_dropout=0.5"] if "lora" in script.__name__ else []
    run(script, *flags, "--train_text_encoder", "--text_encoder_lr=0.1", "--validation_loss", "--train_batch_size=5")
    assert [first for first, _ in pairs] == [second for _, second in pairs]
    assert len({first for first, _ in pairs}) == 2  # before any training, and after the first epoch


@pytest.fixture
def counted_garbage() -> Iterator[None]:
    """Only what the scripts collect on purpose is collected, so that what dies does not die by chance."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[weakref.ref]]:
    """The text encoders and VAEs that are made, by class."""
    references: dict[str, list[weakref.ref]] = {}

    def watch(kind: Any) -> None:
        make = kind.__init__

        @functools.wraps(make)
        def note_and_make(self: Any, *args: Any, **kwargs: Any) -> None:
            references.setdefault(kind.__name__, []).append(weakref.ref(self))
            make(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", note_and_make)

    for kind in (T5EncoderModel, CLIPTextModel, AutoencoderKL):
        watch(kind)
    return references


def alive(references: dict[str, list[weakref.ref]]) -> list[str]:
    return [kind for kind, made in references.items() for reference in made if reference() is not None]


@pytest.mark.usefixtures("counted_garbage")
@one_script
def test_text_encoders_and_vae_are_gone_before_the_transformer_comes(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, made: dict[str, list[weakref.ref]]
) -> None:
    found: list[tuple[set[str], list[str]]] = []
    spy(monkeypatch, script, "load_transformer", lambda *_: found.append((set(made), alive(made))))
    run(script, "--cache_latents")
    assert found == [({"T5EncoderModel", "CLIPTextModel", "AutoencoderKL"}, [])]


@pytest.mark.usefixtures("counted_garbage")
def test_of_the_encoders_only_a_trained_clip_is_there_in_the_loop(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, made: dict[str, list[weakref.ref]]
) -> None:
    found: list[list[str]] = []
    spy(monkeypatch, script, "train", lambda *_: found.append(alive(made)))
    run(script, "--cache_latents", "--train_text_encoder")
    assert found == [["CLIPTextModel"]]


@pytest.mark.usefixtures("counted_garbage")
@one_script
def test_the_class_pictures_pipeline_is_gone_before_prompts_are_encoded(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, made: dict[str, list[weakref.ref]], tmp_path: Path
) -> None:
    found: list[tuple[set[str], list[str]]] = []
    spy(monkeypatch, script, "encode_prompts", lambda *_: found.append((set(made), alive(made))))
    spy(monkeypatch, script, "load_base", lambda *_: found.append((set(made), alive(made))))
    flags = ["--class_prompt=a dog", f"--class_data_dir={tmp_path / 'class'}", "--num_class_images=1"]
    run(script, "--with_prior_preservation", *flags)
    encoders = {"T5EncoderModel", "CLIPTextModel"}
    assert found[:3] == [(set(), []), (encoders, []), (encoders | {"AutoencoderKL"}, [])]


@pytest.mark.usefixtures("counted_garbage")
@pytest.mark.parametrize(
    ("name", "flags"), [("lora", []), ("full", []), ("full", ["--full_bf16"]), ("full", ["--fused_backward_pass"])]
)
def test_the_training_is_gone_before_the_final_pictures_are_drawn(
    name: str, flags: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, references = SCRIPTS[name], dict[str, weakref.ref]()

    def watch(args: Any, accelerator: Any, trained: Any, dtype: torch.dtype) -> None:
        optimizer = trained.optimizer.optimizer
        things = {
            "transformer": trained.transformer,
            "CLIP": trained.text_encoder,
            "optimizer": optimizer,
            "a weight": trained.parameters[0],
        }
        if not flags:
            things["its state"] = optimizer.state[trained.parameters[0]]["exp_avg"]
        else:  # of the optimizer of this weight
            things["its state"] = next(iter(optimizer.optimizers[0][2].state.values()))["exp_avg"]
        references.update({name: weakref.ref(thing) for name, thing in things.items()})

    found: list[list[str]] = []
    spy(monkeypatch, script, "save_results", watch)
    spy(
        monkeypatch,
        script,
        "draw_final_pictures",
        lambda *_: found.append([name for name, reference in references.items() if reference() is not None]),
    )
    run(script, "--mixed_precision=bf16", "--train_text_encoder", "--validation_prompt=a dog", *flags)
    assert len(references) == 5
    assert found == [[]]


@pytest.mark.parametrize("flags", [[], ["--fused_backward_pass"]])
def test_a_checkpoint_gathers_each_model_once(flags: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    spy(monkeypatch, full, "save_weights", lambda accelerator, model, folder, *_: written.append(folder.name))
    run(full, "--train_text_encoder", "--max_train_steps=1", "--checkpointing_steps=1", *flags)
    assert [name for name in written if "checkpoint-1" in name] == [f".checkpoint-1{full.PARTIAL}"] * 2


@pytest.fixture
def captions(pictures: Path, tmp_path: Path) -> list[str]:
    """Flags of a local dataset with five pictures and three captions, which are 3, 1 and 1 picture's."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    folder = tmp_path / "dataset"
    folder.mkdir()
    texts = ["a sks dog", "a sks dog", "a sks dog on a beach", "a sks dog asleep", "a sks dog"]
    rows = []
    for file, text in zip(sorted(pictures.iterdir()), texts, strict=True):
        (folder / file.name).write_bytes(file.read_bytes())
        rows.append(json.dumps({"file_name": file.name, "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return [f"--dataset_name={folder}", "--caption_column=text", f"--cache_dir={tmp_path / 'cache'}"]


@one_script
def test_t5_reads_each_distinct_prompt_once(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, captions: list[str], base_flags: list[str]
) -> None:
    read: list[tuple[int, ...]] = []
    forward = T5EncoderModel.forward

    def record(self: T5EncoderModel, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        read.extend(tuple(row) for row in input_ids.tolist())
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(T5EncoderModel, "forward", record)
    base_flags[:] = [flag for flag in base_flags if not flag.startswith("--instance_data_dir")]
    run(
        script,
        *captions,
        "--repeats=2",
        "--max_train_steps=12",
        "--train_batch_size=2",
        "--max_sequence_length=32",
        "--validation_prompt=a sks dog in a bucket",
    )
    assert len(read) == 4  # three captions and the validation prompt, which tell 20 letters apart
    assert len(set(read)) == 4


@one_script
def test_with_cached_latents_nothing_of_the_encoders_runs_in_the_loop(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, train = set[type](), script.train

    def watch(*args: Any) -> None:
        hook = nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: ran.add(type(module)))
        train(*args)
        hook.remove()

    monkeypatch.setattr(script, "train", watch)
    run(script, "--cache_latents", "--max_train_steps=6")
    assert FluxTransformer2DModel in ran
    assert not ran & {T5EncoderModel, CLIPTextModel, AutoencoderKL, Encoder, Decoder}
    assert not {kind for kind in ran if kind.__module__.startswith(("transformers.", "diffusers.models.autoencoders."))}


def breaking(script: ModuleType, at: int, spoil: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """`training_loss`, spoilt at its call number `at`, with what a trained weight gives for it."""
    training_loss, calls = script.training_loss, iter(range(1, 1000))

    def call(transformer: nn.Module, inputs: Any) -> Tensor:
        loss: Tensor = training_loss(transformer, inputs)
        weight = next(value for value in transformer.parameters() if value.requires_grad)
        return spoil(loss, weight) if next(calls) == at else loss

    return call


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, base_flags: list[str], value: float, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "training_loss", breaking(script, 3, lambda loss, _: loss + value))
    with pytest.raises(script.RunError, match=rf"{value} at step 3\b"):
        run(script, "--max_train_steps=5", "--checkpointing_steps=1")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["checkpoint-1", "checkpoint-2", "flags.txt"]


@one_script
def test_after_a_stop_the_last_checkpoint_goes_on_as_if_nothing_had_happened(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = ["--max_train_steps=4", "--checkpointing_steps=2", "--upcast_before_saving"]
    expected = saved_tensors(run(script, *flags, f"--output_dir={tmp_path / 'whole'}"), "transformer")
    with monkeypatch.context() as patch:
        patch.setattr(script, "training_loss", breaking(script, 3, lambda loss, _: loss * math.nan))
        with pytest.raises(script.RunError, match="the loss is nan"):
            run(script, *flags)
    got = saved_tensors(run(script, *flags, "--resume_from_checkpoint=latest"), "transformer")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_gradient_that_is_no_number_stops_the_run_before_a_checkpoint_holds_it(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The slope of a square root at zero is infinite, and times zero no number; the loss itself stays as it is.
    spoil = breaking(script, 2, lambda loss, weight: loss + (0 * weight.sum()).sqrt())
    monkeypatch.setattr(script, "training_loss", spoil)
    with pytest.raises(script.RunError, match=r"at step 2\b"):
        run(script, "--max_train_steps=5", "--checkpointing_steps=1")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-1", "flags.txt"]
