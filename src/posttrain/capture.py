"""What of a session survives a kill: weights, moments, counters, memory.  Everything else follows from the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.wiring import trained_parameters

if TYPE_CHECKING:
    from posttrain.session import Session
    from posttrain.state import Saved


def captured(session: Session) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A session's state as tensors and JSON values."""
    parameters = trained_parameters(session.models, session.run.method)
    tensors: dict[str, Tensor] = {f"weights:{name}": p.detach() for name, p in parameters.items()}
    for name, stepper in session.steppers.items():
        tensors |= {f"optimizer:{name}:{key}": value for key, value in stepper.tensors().items()}
    tensors |= {f"memory:{key}": v for key, v in session.memory.items() if isinstance(v, Tensor)}
    for name, recall in session.recall.items():
        tensors |= {f"recall:{name}:{key}": value for key, value in recall.tensors().items()}
    values = {
        "memory": {key: v for key, v in session.memory.items() if not isinstance(v, Tensor)},
        "metrics": session.metrics,
        "taken": {name: cursor.taken for name, cursor in session.cursors.items()},
        "updates": {name: stepper.updates for name, stepper in session.steppers.items()},
        "threads": torch.get_num_threads(),
        "token_budget": session.token_budget,
        "products": session.products,
        "best": session.best,
        "skipped": session.skipped,
    }
    return tensors, values


def restore(session: Session, saved: Saved) -> None:
    """Bring a session back to a saved state, in place."""
    tensors, values = saved.tensors, saved.values
    found: Any = values
    with torch.no_grad():
        for name, parameter in trained_parameters(session.models, session.run.method).items():
            parameter.copy_(tensors[f"weights:{name}"])
    for name, stepper in session.steppers.items():
        prefix = f"optimizer:{name}:"
        moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        stepper.restore(moments, int(found["updates"][name]))
    remembered = {k.removeprefix("memory:"): v for k, v in tensors.items() if k.startswith("memory:")}
    session.memory = {**found["memory"], **remembered}
    for name, recall in session.recall.items():
        prefix = f"recall:{name}:"
        recall.restore({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
    session.metrics, session.best = dict(found["metrics"]), dict(found["best"])
    session.skipped = int(found["skipped"])
    for name, taken in found["taken"].items():
        session.cursors[name].taken = int(taken)
    session.step = session.saved = saved.step
    session.sampler.policy_version = sum(s.updates for s in session.steppers.values())
