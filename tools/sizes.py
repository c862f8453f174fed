#!/usr/bin/env python
# Copyright 2026 The FLUX DreamBooth authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Hold the sizes: a script that grows above its bars has to lose something else.

python -m tools.sizes     # a line a script, then what is above its bar, if anything is; the exit code is then 1
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train_dreambooth_lora_flux.py", "train_dreambooth_flux.py")
BARS = {  # of each script
    "tokens": 17_000,
    "lines": 2_200,
    "definitions": 110,  # functions and classes at the top level
    "lines to the banner": 900,
    "comprehensions": 90,
    "conditional expressions": 45,
    "starred": 25,
}
FUNCTION_LINES = 60
LONG_FUNCTIONS = ("make_parser",)  # the table of flags
TEST_LINES = 8_000  # of all tests together
README_LINES = 300
BANNER = "stop reading"

NOT_COUNTED = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
COMPREHENSIONS = (ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)


def measure(source: str) -> dict[str, int]:
    """How much there is in a script of what has a bar; "lines to the banner" is all lines where there is no banner."""
    lines = source.splitlines()
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    tokens = [
        token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in NOT_COUNTED
    ]
    to_banner = len(lines)
    for number, line in enumerate(lines, start=1):
        if line.startswith("#") and BANNER in line.lower():
            to_banner = number
            break
    return {
        "tokens": len(tokens),
        "lines": len(lines),
        "definitions": sum(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body),
        "lines to the banner": to_banner,
        "comprehensions": sum(isinstance(node, COMPREHENSIONS) for node in nodes),
        "conditional expressions": sum(isinstance(node, ast.IfExp) for node in nodes),
        "starred": sum(isinstance(node, ast.Starred) for node in nodes),
    }


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function and method that is too long."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name not in LONG_FUNCTIONS:
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield node.name, length


def count_lines(*paths: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def main() -> None:
    above = []
    for name in SCRIPTS:
        source = (ROOT / name).read_text(encoding="utf-8")
        sizes = measure(source)
        print(f"{name}: " + ", ".join(f"{size:,} {what}" for what, size in sizes.items()))
        for what, bar in BARS.items():
            if sizes[what] > bar:
                above.append(f"{name} has {sizes[what]:,} {what}; the bar is {bar:,}")
        for function, length in long_functions(source):
            above.append(f"{name}: {function} has {length} lines; the bar is {FUNCTION_LINES}")
    tests = count_lines(*ROOT.glob("tests/*.py"), *ROOT.glob("test_*.py"), ROOT / "conftest.py")
    readme = count_lines(ROOT / "README.md")
    print(f"tests: {tests:,} lines; README.md: {readme} lines")
    if tests > TEST_LINES:
        above.append(f"the tests have {tests:,} lines; the bar is {TEST_LINES:,}")
    if readme > README_LINES:
        above.append(f"README.md has {readme} lines; the bar is {README_LINES}")
    if above:
        sys.exit("Too large:\n  " + "\n  ".join(above))


if __name__ == "__main__":
    main()
