"""Every example in a docstring of the library runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import posttrain

ROOT = Path(posttrain.__file__).parent
MODULES = sorted(
    ".".join(("posttrain", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


def test_there_are_examples() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
        runner = doctest.DebugRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
            runner.run(example)
    except doctest.DocTestFailure as failure:
        where = f"{failure.test.filename}, {failure.test.name}: {failure.example.source.strip()}"
        pytest.fail(f"{where}\nexpected: {failure.example.want}\nfound: {failure.got}", pytrace=False)
    except doctest.UnexpectedException as failure:
        if issubclass(failure.exc_info[0], ImportError):
            pytest.skip(f"{name}: {failure.exc_info[1]}")
        raise failure.exc_info[1] from None
    except ImportError as missing:
        pytest.skip(f"{name}: {missing}")
