"""The public names, and how little comes with them."""

from __future__ import annotations

import subprocess
import sys

import posttrain.report


def test_public_names_exist_and_are_sorted() -> None:
    assert posttrain.report.__all__ == sorted(posttrain.report.__all__)
    assert all(hasattr(posttrain.report, name) for name in posttrain.report.__all__)


def test_heavy_packages_wait_until_they_are_used() -> None:
    heavy = ("matplotlib", "jinja2", "numpy", "tensorboard", "wandb", "transformers")
    code = f"import sys, posttrain.report; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
