"""The two scripts share their text: what stands in both under one name is the same, unless it differs on purpose."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train_dreambooth_flux.py", "train_dreambooth_lora_flux.py")
DIFFERENT_ON_PURPOSE = {
    "<docstring>": "says what is trained",
    "<imports>": "peft here, whole weights there",
    "(KIND, TAGS, PROJECT)": "what the model card and trackers call it",
    "(OUTPUT_DIR, TEXT_LENGTH)": "two defaults that diffusers' scripts differ in",
    "StepInputs": "the base as the prior: full fine-tuning has no base left",
    "prepare_inputs": "the base as the prior: full fine-tuning has no base left",
    "prepare_data": "the base as the prior: full fine-tuning has no base left",
    "training_loss": "the base as the prior: full fine-tuning has no base left",
    "OWN_FLAGS": "adapters and a frozen base, or whole weights",
    "LESS_MEMORY": "other flags save memory",
    "own_contradictions": "adapters, and other ways to save memory",
    "load_base": "a frozen base can be quantized and swapped",
    "check_parts": "adapters on a frozen base, or every weight",
    "read_lora": "adapters take its weights, whole weights its changes",
    "read_transformer": "not a base that is quantized, not under the fused backward pass",
    "load_transformer": "adapters on a frozen base, or every weight",
    "load_text_encoder": "adapters on a frozen base, or every weight",
    "prepare_training": "what the loaders take, and updates one weight at a time",
    "backward": "a step inside the backward pass must not start on a broken loss",
    "clip_gradients": "a step inside the backward pass has clipped already",
    "register_state_hooks": "a checkpoint holds adapters, or whole weights",
    "load_weights": "adapters, or whole weights",
    "start_from_lora": "adapters take its weights, whole weights its changes",
    "LOADS": "what a card's code calls",
    "ON_REQUEST": "the files of the result",
    "RESULTS": "the files of the result",
    "save_results": "one LoRA file, or a pipeline folder",
    "load_results": "base and LoRA file, or the pipeline folder",
    "loading_code": "base and LoRA file, or the pipeline folder",
}
ONLY_IN_ONE = {
    # LoRA
    "TRANSFORMER_TARGETS",
    "TEXT_ENCODER_TARGETS",
    "add_adapter",
    "transformer_targets",
    "prior_prompt",
    "predict_base_velocity",
    "swap_blocks",
    "quantize_base",
    "QuantizedLinear",
    "QuantizedProduct",
    "unpack_weight",
    "BlockSwap",
    "leave_frozen_out",
    "set_adapters",
    "LORA_FILE",
    "METADATA",
    "save_adapters",
    # full
    "PerParameterOptimizer",
    "round_stochastically_",
    "TRANSFORMER_FILES",
    "SINGLE_FILE",
    "COMPONENTS",
    "save_weights",
}


def block_name(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    if isinstance(node, ast.Import | ast.ImportFrom):
        return "<imports>"
    return "<docstring>" if isinstance(node, ast.Expr) else "<run>"


def read_blocks(path: Path) -> dict[str, str]:
    """The text of each top-level block, comments in front of it included, in order. The head is a block as well."""
    source = path.read_text()
    lines, blocks, start = source.splitlines(), {}, 0
    for node in ast.parse(source).body:
        name = block_name(node)
        blocks[name] = blocks.get(name, "") + "\n".join(lines[start : node.end_lineno]).strip("\n") + "\n"
        start = node.end_lineno or start
    return blocks


FULL, LORA = (read_blocks(ROOT / name) for name in SCRIPTS)


def test_same_named_blocks_have_the_same_text() -> None:
    differ = {name for name in FULL.keys() & LORA.keys() if FULL[name] != LORA[name]}
    assert differ == set(DIFFERENT_ON_PURPOSE), "edit both scripts, or give the reason in DIFFERENT_ON_PURPOSE"


def test_nothing_else_stands_in_only_one_script() -> None:
    assert FULL.keys() ^ LORA.keys() == ONLY_IN_ONE


def test_shared_blocks_stand_in_the_same_order() -> None:
    shared = FULL.keys() & LORA.keys()
    assert [name for name in FULL if name in shared] == [name for name in LORA if name in shared]


def test_dependencies_are_those_of_the_requirements_file() -> None:
    wanted = [line for line in (ROOT / "requirements_flux.txt").read_text().splitlines() if line and line[0] != "#"]
    for name in SCRIPTS:
        head = (ROOT / name).read_text().split("# ///\n")[0]
        listed = head.split("dependencies = [")[1].split("# ]")[0]
        assert re.findall(r'"(.*?)"', listed) == wanted
