"""The model card and the push, on a stand-in of the Hub: what they tell, what is uploaded, where the token goes."""

import gc
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import _http

from conftest import Run, both_scripts, one_script
from tests.local_hub import HubState

pytestmark = one_script

PUSH = ("--push_to_hub", "--hub_token=hf_secret", "--hub_model_id=sks-dog", "--report_to=tensorboard")
PROMPTS = ('a "sks" dog: running | barking', "un chien sks à la plage")
TWO_EACH = (*(f"--validation_prompt={prompt}" for prompt in PROMPTS), "--num_validation_images=2")
DRAWN = ("--checkpointing_steps=1", "--validation_prompt=a sks dog", "--validation_steps=1")


def uploaded(hub: HubState) -> dict[str, bytes]:
    return hub.repositories["tester/sks-dog"]


@both_scripts
def test_the_result_arrives_and_checkpoints_and_logs_do_not(script: ModuleType, run: Run, hub: HubState) -> None:
    run(script, "--max_train_steps=1")
    output = run(script, *PUSH, *DRAWN)
    assert all((output / name).is_dir() for name in ("checkpoint-2", "logs", "validation", "earlier-1"))
    weights = "pytorch_lora_weights.safetensors"
    wanted = {"README.md", "image_0.png", weights}
    if "lora" not in script.__name__:
        weights = "transformer/diffusion_pytorch_model.safetensors"
        wanted = {"README.md", "image_0.png", "model_index.json", "scheduler", "text_encoder", "text_encoder_2", "vae"}
        wanted |= {"tokenizer", "tokenizer_2", "transformer"}
    files = uploaded(hub)
    assert {name.split("/")[0] for name in files} - {".gitattributes"} == wanted
    for name in (weights, "README.md", "image_0.png"):
        assert files[name] == (output / name).read_bytes()


def test_the_token_goes_with_every_call_and_into_no_file(script: ModuleType, run: Run, hub: HubState) -> None:
    hub.token = "hf_secret"
    output = run(script, *PUSH, *DRAWN)
    calls = [call for call in hub.requests if call[1].startswith("/api/") and call[1] != "/api/validate-yaml"]
    assert calls and {authorization for _, _, authorization in calls} == {"Bearer hf_secret"}
    files = [path for path in output.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files) and any(path.name == "hparams.yml" for path in files)
    assert [path for path in files if b"hf_secret" in path.read_bytes()] == []


def test_the_command_line_that_trackers_upload_has_no_token(
    script: ModuleType, base_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token=hf_secret", "--hub_token", "hf_secret"])
    seen: list[str] = []
    tracker = SimpleNamespace(init_trackers=lambda *_, config: seen.extend([*sys.argv, *config.values()]))
    script.start_trackers(script.parse_args([*base_flags, "--hub_token=hf_secret\r\n"]), tracker)
    assert len(seen) > 50 and [word for word in seen if "hf_secret" in word] == []


def test_a_refused_token_stops_the_run_before_a_model_is_loaded(
    script: ModuleType, run: Run, hub: HubState, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "another"
    monkeypatch.setattr(script, "encode_prompts", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(script.UsageError, match=r"(?s)the Hub refused sks-dog.*401.*`hf auth login`"):
        run(script, *PUSH)


def test_a_connection_that_is_lost_for_a_moment_is_tried_again(script: ModuleType, run: Run, hub: HubState) -> None:
    hub.drop_blobs = 1
    run(script, *PUSH, "--max_train_steps=1")
    assert hub.drop_blobs == 0 and "README.md" in uploaded(hub)


def test_an_upload_that_fails_keeps_the_result_and_the_same_command_pushes_it(
    script: ModuleType, run: Run, hub: HubState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # between the client's attempts
    hub.refuse_commits = 100
    with pytest.raises(SystemExit, match=r"(?s)to tester/sks-dog failed.*; the result is in .*/out$") as stop:
        run(script, *PUSH, "--checkpointing_steps=2")
    assert "hf_secret" not in str(stop.value) and uploaded(hub) == {}
    stop.value.__traceback__ = None
    del stop  # and with it the run's lock, which the end of a process lets go
    gc.collect()
    hub.refuse_commits = 0
    output = run(script, *PUSH, "--checkpointing_steps=2", "--resume_from_checkpoint=latest")
    assert uploaded(hub)["README.md"] == (output / "README.md").read_bytes()
    assert b"for 2 steps" in uploaded(hub)["README.md"] and not list(output.glob("earlier-*"))


@both_scripts
def test_the_card_is_what_the_hub_takes_and_shows_each_picture_with_its_prompt(
    script: ModuleType, run: Run, hub: HubState
) -> None:
    output = run(script, *TWO_EACH)
    card = ModelCard.load(output / "README.md")
    card.validate()  # asks the stand-in, which refuses what the Hub refuses
    assert len(hub.cards) == 1 and "<Gallery />" in card.text
    shown = [(entry["text"], entry["output"]["url"]) for entry in card.data.widget]
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert shown == [(prompt, f"image_{number}.png") for number, prompt in enumerate(prompts)]
    assert all((output / name).is_file() for _, name in shown)


@both_scripts
@pytest.mark.parametrize(
    ("checkpoint", "licence"),
    [("tiny_flux", ("other", "flux-1-dev-non-commercial-license")), ("tiny_schnell", ("apache-2.0", None))],
)
def test_the_licence_is_that_of_the_base(
    script: ModuleType, run: Run, request: pytest.FixtureRequest, checkpoint: str, licence: tuple, hub: HubState
) -> None:
    folder = request.getfixturevalue(checkpoint)
    card = ModelCard.load(run(script, f"--pretrained_model_name_or_path={folder}", "--max_train_steps=1") / "README.md")
    card.validate()
    assert "<Gallery />" not in card.text  # no pictures were drawn
    assert (card.data.license, card.data.to_dict().get("license_name")) == licence
    assert ("FLUX.1-dev/blob/main/LICENSE" in card.text) == (checkpoint == "tiny_flux")


def test_the_card_tells_trigger_word_steps_and_what_was_changed_but_no_path_of_this_machine(
    script: ModuleType, run: Run, tmp_path: Path
) -> None:
    flags = ["--instance_prompt=a {trigger}", "--trigger_word=ohwx", "--repeats=3", "--seed=7"]
    text = (run(script, *flags, "--learning_rate=0.0003") / "README.md").read_text()
    assert "trained for 2 steps with seed 7" in text and ModelCard(text).data.instance_prompt == "a ohwx"
    told = dict(re.findall(r"^    (?:--)?(\w+)\W+(.+)$", text, re.MULTILINE))
    assert told["learning_rate"] == "0.0003" and told["repeats"] == "3" and told["trigger_word"] == "ohwx"
    assert not {"adam_beta1", "rank", "hub_token"} & told.keys() and str(tmp_path.parent) not in text
