"""For all tests: one thread, so that numbers repeat; `build` and `small` importable from every folder; one small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 2 layers and width 32 with the embedded model's tokenizer, as a folder: steps take milliseconds."""
    from small import save_small_model

    return save_small_model(tmp_path_factory.mktemp("model") / "small")
