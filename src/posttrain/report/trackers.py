"""Receivers of a run's numbers beside `metrics.jsonl`: TensorBoard and Weights & Biases, each an extra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from posttrain.errors import ConfigError, extra, nearest


class Tracker(Protocol):
    """Who else wants the numbers of every step."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of one step; may raise, and then gets no more."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


class TensorBoard:
    """Event files in `folder`, one curve a metric; after a resume, curves are cut at `resume_step`.

    Args:
        folder: Where the event files lie.
        resume_step: The first step that will be done again, or None.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path, *, resume_step: int | None = None) -> None:
        extra("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run on Weights & Biases.

    The service keeps no step twice: numbers of steps that are done again after a resume are dropped there, and equal
    those it has.

    Args:
        project: The project's name.
        name: The run's name.
        folder: Where its local files lie, and the run's identity, so that a resumed run goes on in the same one.
        config: The resolved recipe.
        resume_step: The first step that will be done again, or None.

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(
        self,
        project: str,
        name: str,
        *,
        folder: str | Path,
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ) -> None:
        wandb = extra("wandb", "wandb")
        self._run: Any = wandb.init(
            project=project,
            name=name,
            id=None if resume_step is None else _remembered(Path(folder)),
            dir=str(folder),
            config=dict(config or {}),
            resume="allow",
        )
        (Path(folder) / "wandb_id.txt").write_text(str(self._run.id), encoding="utf-8")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({name: value for name, value in numbers.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(names: Sequence[str], folder: str | Path, *, resume_step: int | None = None) -> list[Tracker]:
    """Trackers by name: 'tensorboard' writes into `folder/tensorboard`, 'wandb' into the project of the folder above.

    Raises:
        ConfigError: A name is neither.
        MissingExtraError: A tracker's package is not installed.
    """
    folder = Path(folder)
    found: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            found.append(TensorBoard(folder / "tensorboard", resume_step=resume_step))
        elif name == "wandb":
            project = folder.resolve().parent.name or "posttrain"
            found.append(WandB(project, folder.name, folder=folder, resume_step=resume_step))
        else:
            raise ConfigError(f"'{name}' is no tracker{nearest(name, ('tensorboard', 'wandb'))}")
    return found


def _remembered(folder: Path) -> str | None:
    """The identity that the interrupted run was given."""
    path = folder / "wandb_id.txt"
    return path.read_text(encoding="utf-8").strip() if path.exists() else None
