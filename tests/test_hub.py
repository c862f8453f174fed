"""The push, on a stand-in of the Hub: what is uploaded, and where the token goes."""

import json
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import _http

from conftest import Run, both_scripts, one_script
from tests.local_hub import HubState

pytestmark = one_script

PUSH = ("--push_to_hub", "--hub_token=hf_secret", "--hub_model_id=sks-dog", "--report_to=tensorboard")
CHECKPOINTS = (
    "--max_train_steps=5",
    "--checkpointing_steps=1",
    "--validation_prompt=a sks dog",
    "--validation_epochs=1",
)


def uploaded(hub: HubState) -> dict[str, bytes]:
    return hub.repositories["tester/sks-dog"]


@both_scripts
def test_the_result_arrives_and_checkpoints_and_logs_do_not(script: ModuleType, run: Run, hub: HubState) -> None:
    output = run(script, *PUSH, *CHECKPOINTS)
    assert (output / "checkpoint-5").is_dir() and (output / "logs").is_dir() and (output / "validation").is_dir()
    files = uploaded(hub)
    assert {path.split("/")[0] for path in files} <= {
        "README.md", "image_0.png", "contact_sheet.jpg",
        ".gitattributes", "pytorch_lora_weights.safetensors", "model_index.json",
        "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae",
    }  # fmt: skip
    weights = "pytorch_lora_weights.safetensors"
    if "lora" not in script.__name__:
        weights = "transformer/diffusion_pytorch_model.safetensors"
        assert (output / "model_index.json").read_bytes() == files["model_index.json"]
    for name in (weights, "README.md", "image_0.png", "contact_sheet.jpg"):
        assert files[name] == (output / name).read_bytes()


def test_every_call_to_the_hub_carries_the_token(script: ModuleType, run: Run, hub: HubState) -> None:
    hub.token = "hf_secret"
    run(script, *PUSH)
    calls = [call for call in hub.requests if call[1].startswith("/api/") and call[1] != "/api/validate-yaml"]
    assert calls and all(authorization == "Bearer hf_secret" for _, _, authorization in calls)


def test_the_token_is_in_no_file_that_is_written(script: ModuleType, run: Run, hub: HubState) -> None:
    output = run(script, *PUSH, *CHECKPOINTS)
    files = [path for path in output.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files) and any(path.name == "hparams.yml" for path in files)
    assert [path for path in files if b"hf_secret" in path.read_bytes()] == []


def test_a_refused_token_stops_the_run_before_a_model_is_loaded(
    script: ModuleType, run: Run, hub: HubState, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.token = "another"
    monkeypatch.setattr(script, "encode_prompts", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(script.UsageError, match="--hub_token"):
        run(script, *PUSH)
    assert not (tmp_path / "out" / "logs").exists()


@both_scripts
def test_the_card_names_trigger_words_settings_licence_and_shows_the_gallery(
    script: ModuleType, run: Run, hub: HubState
) -> None:
    run(script, *PUSH, *CHECKPOINTS, "--learning_rate=0.0003")
    card = ModelCard(uploaded(hub)["README.md"].decode())
    assert card.data.license == "other" and card.data.license_name == "flux-1-dev-non-commercial-license"
    assert card.data.instance_prompt == "a photo of sks dog"
    assert card.data.widget[0]["text"] == "a sks dog" and card.data.widget[0]["output"] == {"url": "image_0.png"}
    assert "\n    --learning_rate=0.0003\n" in card.text
    assert "--adam_beta1" not in card.text, "a setting at its default is listed"
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "tester/sks-dog" in code and ("load_lora_weights" in code) == ("lora" in script.__name__)


def test_a_connection_that_is_lost_for_a_moment_is_tried_again(script: ModuleType, run: Run, hub: HubState) -> None:
    hub.drop_blobs = 1
    run(script, *PUSH, "--max_train_steps=1")
    assert hub.drop_blobs == 0 and "README.md" in uploaded(hub)


def failed_push(script: ModuleType, run: Run, hub: HubState) -> str:
    with pytest.raises(script.RunError) as error:
        run(script, *PUSH, "--max_train_steps=1")
    assert uploaded(hub) == {}
    return str(error.value)


def test_an_upload_that_fails_keeps_the_result_and_says_how_to_push_again(
    script: ModuleType, run: Run, hub: HubState, tmp_path: Path
) -> None:
    hub.refuse_commits = 100
    message = failed_push(script, run, hub)
    command = message.split("to push again: ")[1]
    assert "the upload to tester/sks-dog failed" in message and "hf_secret" not in message
    hub.refuse_commits = 0
    words = shlex.split(command)
    assert words[:3] == ["hf", "upload", "tester/sks-dog"] and Path(words[3]) == tmp_path / "out" and words[4] == "."
    patterns = [word.removeprefix("--include=") for word in words[5:]]
    HfApi(token="hf_secret").upload_folder(repo_id=words[2], folder_path=words[3], allow_patterns=patterns)
    assert "README.md" in uploaded(hub) and not [name for name in uploaded(hub) if "checkpoint" in name]
    assert (tmp_path / "out" / script.RESULT_FILE).is_file()


def test_a_connection_that_stays_lost_keeps_the_result(
    script: ModuleType, run: Run, hub: HubState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.drop_blobs = 100
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # between the client's attempts
    assert "failed" in failed_push(script, run, hub) and (tmp_path / "out" / "README.md").is_file()


def test_a_token_that_is_refused_at_the_end_keeps_the_result(
    script: ModuleType, run: Run, hub: HubState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_and_save = script.train_and_save
    monkeypatch.setattr(
        script, "train_and_save", lambda *args: (train_and_save(*args), setattr(hub, "token", "another"))
    )
    assert "401" in failed_push(script, run, hub) and (tmp_path / "out" / "README.md").is_file()


def test_a_finished_run_that_is_pushed_later_has_a_card_that_names_the_repository(
    script: ModuleType, run: Run, hub: HubState
) -> None:
    output = run(script, "--max_train_steps=3", "--seed=5")
    mark = json.loads((output / script.RESULT_FILE).read_text())
    mark |= {"seed": None}  # as if it had been drawn
    (output / script.RESULT_FILE).write_text(json.dumps(mark))
    with (output / "README.md").open("a") as file:
        file.write("What I found out\n")
    run(script, "--max_train_steps=3", "--resume_from_checkpoint=latest", *PUSH)
    card = uploaded(hub)["README.md"].decode()
    assert '("tester/sks-dog"' in card and "3 steps of" in card and "seed 5\n" in card
    assert card.endswith("What I found out\n")
    run(script, "--max_train_steps=3", "--resume_from_checkpoint=latest", *PUSH, "--hub_model_id=sks-cat")
    card = hub.repositories["tester/sks-cat"]["README.md"].decode()
    assert '("tester/sks-cat"' in card and "tester/sks-dog" not in card
    (output / "README.md").unlink()
    run(script, "--max_train_steps=3", "--resume_from_checkpoint=latest", *PUSH)
    assert "3 steps of" in uploaded(hub)["README.md"].decode()


def test_the_command_line_that_trackers_upload_has_no_token(
    script: ModuleType, base_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token=hf_secret", "--hub_token", "hf_secret"])
    args = script.parse_args([*base_flags, "--hub_token=hf_secret"])
    seen: list[str] = []
    script.start_trackers(args, SimpleNamespace(init_trackers=lambda *_, **__: seen.extend(sys.argv)))
    assert seen == ["train.py", "--hub_token=***", "--hub_token", "***"]


def test_a_token_of_an_unset_variable_is_none_and_one_of_a_file_is_stripped(
    script: ModuleType, base_flags: list[str]
) -> None:
    assert script.parse_args([*base_flags, "--hub_token="]).hub_token is None
    assert script.parse_args([*base_flags, "--hub_token=hf_secret\r\n"]).hub_token == "hf_secret"
    assert "revision" not in script.hub_options(script.parse_args([*base_flags, "--revision="]))
