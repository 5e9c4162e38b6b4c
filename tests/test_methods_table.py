"""The table of methods: sorted, sourced, light, and every field explained."""

import ast
import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import posttrain
from posttrain import methods
from posttrain.errors import ConfigError
from posttrain.method import Method

ROOT = Path(posttrain.__file__).parent


def test_names_are_sorted_and_each_class_is_there() -> None:
    assert list(methods.METHODS) == sorted(methods.METHODS)
    for name in methods.METHODS:
        cls = methods.method(name)
        assert issubclass(cls, Method)
        assert cls is getattr(methods, cls.__name__)
        assert methods.info(name).cls == cls.__name__


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_every_method_has_a_source_and_plain_defaults(name) -> None:
    found = methods.info(name)
    assert found.title
    assert found.arxiv
    assert found.summary.endswith(".")
    assert (ROOT / found.file).exists()
    assert "Rows" in (methods.method(name).__doc__ or "")
    assert methods.method(name)().parts()


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_every_field_is_explained_under_it(name) -> None:
    found = methods.info(name)
    tree = ast.parse((ROOT / found.file).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == found.cls)
    explained = {
        field.target.id
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
    assert {field.name for field in dataclasses.fields(methods.method(name))} <= explained


def test_the_table_is_read_without_torch() -> None:
    program = "import sys, posttrain.methods as m; [m.info(n) for n in m.METHODS]; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_misspelt_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'dpo'"):
        methods.method("dpoo")
    with pytest.raises(AttributeError, match="nearest"):
        _ = methods.GRP0
