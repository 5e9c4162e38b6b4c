"""The house: imports go one way, nothing heavy is imported early, public names are listed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import posttrain

ROOT = Path(posttrain.__file__).parent

LEVELS = [
    {"errors", "exact_json", "random", "allocator", "compiled"},
    {"types"},
    {"formulas", "layout", "pack", "prefixes", "records", "resolve", "files", "lock", "manifest", "tensor_file", "state"},
    {"reads", "models", "distributed"},
    {"forward", "method"},
    {"methods", "data", "samplers", "rewards", "judges", "constitution", "tasks", "tiny", "report"},
    {"recall"},
    {"experience", "score", "step", "scoring", "monitor", "evaluation", "synthesis", "wiring", "options"},
    {"session", "opening", "capture", "held_out", "run", "recipe", "catalogue", "blame", "plan"},
    {"pipeline", "quick", "bench", "annotate"},
    {"cli_options"},
    {"cli_feedback"},
    {"cli"},
    {"__main__", "__init__", "recipes"},
]
"""Each level may import its own and those above it in this list."""


def level_of(name: str) -> int:
    for number, names in enumerate(LEVELS):
        if name in names:
            return number
    raise AssertionError(f"'{name}' has no place in the house: add it to a level")


def imports_at_start(path: Path) -> set[str]:
    """First parts of `posttrain.<part>` imported when the module is imported (not in functions, not for typing only)."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                visit(node.orelse)
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "posttrain":
                parts = node.module.split(".")
                found.update([parts[1]] if len(parts) > 1 else [alias.name for alias in node.names])
            elif isinstance(node, ast.Import):
                found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("posttrain."))
            else:
                for inner in ("body", "orelse", "finalbody"):
                    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                        visit([n for n in getattr(node, inner, []) if isinstance(n, ast.stmt)])

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports_at_start(path):
        assert level_of(name) <= level_of(own), f"{own} imports {name}, which stands above it"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, posttrain; print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nsys.argv = ['posttrain', '--help']\nfrom posttrain.cli import app\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_public_names_are_listed_sorted_and_there() -> None:
    assert posttrain.__all__ == sorted(posttrain.__all__)
    for name in posttrain.__all__:
        assert getattr(posttrain, name) is not None


def test_at_most_ten_direct_dependencies() -> None:
    import tomllib

    path = ROOT.parent.parent / "pyproject.toml"
    if not path.is_file():
        pytest.skip("not a checkout")
    assert len(tomllib.loads(path.read_text())["project"]["dependencies"]) <= 10


def test_no_pickle_and_no_eval_in_the_library() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path.name}:{node.lineno}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "cloudpickle", "joblib"} & set(names), f"{path.name}:{node.lineno}"
