"""The push, on a stand-in of the Hub: what is uploaded, and where the token goes."""

from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import ModelCard

from conftest import Run
from tests.local_hub import HubState

PUSH = ("--push_to_hub", "--hub_token=hf_secret", "--hub_model_id=sks-dog", "--report_to=tensorboard")
CHECKPOINTS = (
    "--max_train_steps=5",
    "--checkpointing_steps=1",
    "--validation_prompt=a sks dog",
    "--validation_epochs=1",
)


def uploaded(hub: HubState) -> dict[str, bytes]:
    return hub.repositories["tester/sks-dog"]


def test_the_result_arrives_and_checkpoints_and_logs_do_not(script: ModuleType, run: Run, hub: HubState) -> None:
    output = run(script, *PUSH, *CHECKPOINTS)
    assert (output / "checkpoint-5").is_dir() and (output / "logs").is_dir() and (output / "validation").is_dir()
    files = uploaded(hub)
    assert {path.split("/")[0] for path in files} <= {
        "README.md", "image_0.png", "contact_sheet.jpg", "loss_curve.png",
        ".gitattributes", "pytorch_lora_weights.safetensors", "model_index.json",
        "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae",
    }  # fmt: skip
    weights = "pytorch_lora_weights.safetensors"
    if "lora" not in script.__name__:
        weights = "transformer/diffusion_pytorch_model.safetensors"
        assert (output / "model_index.json").read_bytes() == files["model_index.json"]
    for name in (weights, "README.md", "image_0.png", "contact_sheet.jpg", "loss_curve.png"):
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


def test_the_card_names_trigger_words_settings_licence_and_shows_the_gallery(
    script: ModuleType, run: Run, hub: HubState
) -> None:
    run(script, *PUSH, *CHECKPOINTS, "--learning_rate=0.0003")
    card = ModelCard(uploaded(hub)["README.md"].decode())
    assert card.data.license == "other" and card.data.license_name == "flux-1-dev-non-commercial-license"
    assert card.data.instance_prompt == "a photo of sks dog"
    assert card.data.widget[0]["text"] == "a sks dog" and card.data.widget[0]["output"] == {"url": "image_0.png"}
    assert "| `--learning_rate` | `0.0003` |" in card.text
    assert "--adam_beta1" not in card.text, "a setting at its default is listed"
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "tester/sks-dog" in code and ("load_lora_weights" in code) == ("lora" in script.__name__)
