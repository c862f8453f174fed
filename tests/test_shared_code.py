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
    "train": "updates inside the backward pass",
    "StepInputs": "the base as the prior: full fine-tuning has no base left",
    "prepare_inputs": "the base as the prior",
    "training_loss": "the base as the prior",
    "prepare_data": "the base as the prior",
    "load_transformer": "adapters on a frozen base, or every weight",
    "load_text_encoder": "adapters on a frozen base, or every weight",
    "make_optimizer": "many weights, each with an update of its own",
    "draw_validation_pictures": "processes that hold parts of a model draw together",
    "make_parser": "the last group of flags",
    "own_problems": "the last group of flags",
    "draw_class_pictures": "a frozen base can be swapped",
    "load_base": "a frozen base can be quantized and swapped",
    "make_accelerator": "adapters are not sharded",
    "prepare_training": "what the loaders take, shards, and updates inside the backward pass",
    "check_model": "layers of the adapters",
    "read_lora": "adapters take its weights, whole weights its changes",
    "FITTING_FLAGS": "the flags of what is trained",
    "put_in_place": "a part of a pipeline replaces one that is there",
    "register_state_hooks": "a checkpoint holds adapters, or whole weights",
    "RESULTS": "one LoRA file, or a pipeline folder",
    "save_result": "one LoRA file, or a pipeline folder",
    "draw_final_pictures": "base and LoRA file, or the pipeline folder",
    "push_to_hub": "one LoRA file, or a pipeline folder",
    "stage": "other flags save memory",
}
ONLY_IN_LORA = {
    "TRANSFORMER_TARGETS", "TEXT_ENCODER_TARGETS", "add_adapter", "set_adapters", "LORA_FILE", "METADATA",
    "save_adapters", "add_base_prior", "prior_prompt", "predict_base_velocity", "swapped_blocks", "move_base",
    "SwappedWeights", "QuantizedProduct", "QuantizedLinear",
}  # fmt: skip
ONLY_IN_FULL = {
    "normalize", "PerParameterOptimizer", "round_stochastically_", "is_sharded", "set_up_sharding", "start_from_lora",
    "TRANSFORMER_FILES", "SINGLE_FILE", "COMPONENTS", "complete_pipeline", "save_weights", "whole_weights",
}  # fmt: skip


def block_name(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    if isinstance(node, ast.Import | ast.ImportFrom):
        return "<imports>"
    return "<docstring>" if isinstance(node, ast.Expr) else "<run>"


def read_blocks(path: Path) -> dict[str, str]:
    """The text of each top-level block in order, with the comments in front of it; headings of sections left out."""
    source = path.read_text()
    lines, blocks, start = source.splitlines(), {}, 0
    for node in ast.parse(source).body:
        name, own = block_name(node), [line for line in lines[start : node.end_lineno] if line[:4] != "# =="]
        blocks[name] = blocks.get(name, "") + "\n".join(own).strip("\n") + "\n"
        start = node.end_lineno or start
    return blocks


FULL, LORA = (read_blocks(ROOT / name) for name in SCRIPTS)


def test_same_named_blocks_have_the_same_text() -> None:
    differ = {name for name in FULL.keys() & LORA.keys() if FULL[name] != LORA[name]}
    assert differ == set(DIFFERENT_ON_PURPOSE), "edit both scripts, or give the reason in DIFFERENT_ON_PURPOSE"


def test_all_groups_of_flags_but_the_last_have_the_same_text() -> None:
    full, lora = (blocks["make_parser"].split("    group = ")[:-1] for blocks in (FULL, LORA))
    assert len(lora) > 8 and full == lora


def test_nothing_else_stands_in_only_one_script() -> None:
    assert (LORA.keys() - FULL.keys(), FULL.keys() - LORA.keys()) == (ONLY_IN_LORA, ONLY_IN_FULL)


def test_shared_blocks_stand_in_the_same_order() -> None:
    shared = FULL.keys() & LORA.keys()
    assert [name for name in FULL if name in shared] == [name for name in LORA if name in shared]


def test_dependencies_are_those_of_the_requirements_file() -> None:
    wanted = [line for line in (ROOT / "requirements_flux.txt").read_text().splitlines() if line and line[0] != "#"]
    for name in SCRIPTS:
        head = (ROOT / name).read_text().split("# ///\n")[0]
        listed = head.split("dependencies = [")[1].split("# ]")[0]
        assert re.findall(r'"(.*?)"', listed) == wanted
