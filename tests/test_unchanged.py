"""A command trains as it always did: its losses are those that were recorded."""

from types import ModuleType

import pytest

from conftest import Run

COMMANDS = {
    "plain": ["--max_train_steps=6"],
    "clip": ["--train_text_encoder", "--text_encoder_lr=1e-3", "--max_train_steps=3"],
    "logit-normal": ["--weighting_scheme=logit_normal", "--gradient_accumulation_steps=2", "--train_batch_size=2"],
}
LOSSES = {
    ("full", "plain"): [3.86223, 2.79755, 2.51595, 2.53605, 2.94787, 2.67193],
    ("full", "clip"): [3.86223, 2.88736, 2.56051],
    ("full", "logit-normal"): [3.11341, 3.1289],
    ("lora", "plain"): [3.86223, 2.91891, 3.12387, 3.07125, 3.94461, 3.28249],
    ("lora", "clip"): [3.86223, 2.92134, 3.09998],
    ("lora", "logit-normal"): [3.11341, 3.53526],
}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_losses_are_those_that_were_recorded(
    script: ModuleType, run: Run, name: str, logged: list[dict[str, float]]
) -> None:
    run(script, *COMMANDS[name], "--random_flip", "--learning_rate=1e-3")
    wanted = LOSSES["lora" if "lora" in script.__name__ else "full", name]
    assert [values["loss"] for values in logged] == pytest.approx(wanted, rel=1e-4)
