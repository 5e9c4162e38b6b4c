"""Worlds of one rank, and of two or three processes started as torchrun starts them."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.distributed.world import World, _buckets
from posttrain.errors import ConfigError

SOURCE = Path(__file__).resolve().parents[1] / "src"

LAUNCHER = """
import json, math, os, signal, sys, time, traceback
import torch
torch.set_num_threads(1)
from posttrain.distributed.world import World
from posttrain.errors import WorldError
children = {}
for name, scenario in json.load(sys.stdin).items():
    for rank in range(scenario["started"]):
        child = os.fork()
        if child:
            children[child] = f"{name}-{rank}"
            continue
        os.environ.update(scenario["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
        try:
            answer = {}
            exec(scenario["body"], {**globals(), "answer": answer, "rank": rank})
        except BaseException:
            answer = {"error": traceback.format_exc()}
        print(json.dumps([name, rank, answer]) + chr(10), end="", flush=True)
        time.sleep(scenario["linger"])
        os._exit(0)
until = time.monotonic() + 60
while children and time.monotonic() < until:
    done, status = os.waitpid(-1, os.WNOHANG)
    children.pop(done, None)
    time.sleep(0.02)
for child in children:
    os.kill(child, signal.SIGKILL)
"""
"""Forks the ranks of all scenarios at once, so that torch is imported once and the waits overlap."""

JOIN = "world = World.here(timeout_seconds=20)\n"

Answers = dict[str, dict[int, dict[str, Any]]]


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def answers() -> Answers:
    """What each rank of each scenario answered; a rank that was killed has no entry."""
    scenarios = {
        "sums": (JOIN + SUMS_AND_GATHERS, 2, 2),
        "order": (JOIN + ORDER, 3, 3),
        "dead": (JOIN + DEAD, 2, 2),
        "late": (JOIN + LATE, 2, 2),
        "astray": (JOIN + ASTRAY, 2, 2),
        "alone": (ALONE, 2, 1),
    }
    plan = {
        name: {
            "body": body,
            "started": started,
            "linger": 3.0 if name == "dead" else 0.0,
            "environment": {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)},
        }
        for port, (name, (body, size, started)) in zip(free_ports(len(scenarios)), scenarios.items(), strict=True)
    }
    process = subprocess.run(
        [sys.executable, "-c", LAUNCHER],
        input=json.dumps(plan),
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found: Answers = {name: {} for name in plan}
    for line in process.stdout.splitlines():
        if line.strip():
            name, rank, answer = json.loads(line)
            assert "error" not in answer, answer["error"]
            found[name][rank] = answer
    return found


def test_a_world_of_one_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.here()
    rows = torch.arange(6).reshape(2, 3)
    assert (world.rank, world.size) == (0, 1)
    assert torch.equal(world.all_sum(rows), rows)
    assert world.all_sum(rows) is not rows
    assert torch.equal(world.all_gather_rows(rows), rows)
    assert world.all_gather_json({"x": math.inf}) == [{"x": math.inf}]
    assert world.broadcast_json([1, "a"]) == [1, "a"]
    world.barrier("start")
    world.close()
    with pytest.raises(TypeError, match="tuple"):  # refused on one rank as on many
        world.all_gather_json({"x": (1, 2)})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "expected two integers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "0 <= RANK < WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ],
)
def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        World.here()


def test_buckets_hold_neighbours_of_one_dtype_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.distributed.world.BUCKET_BYTES", 16)
    a, b, c, d = torch.zeros(2), torch.zeros(2), torch.zeros(9), torch.zeros(1, dtype=torch.float64)
    assert [[x.numel() for x in bucket] for bucket in _buckets([a, b, c, d])] == [[2, 2], [9], [1]]
    assert list(_buckets([])) == []


SUMS_AND_GATHERS = """
out = answer
torch.manual_seed(rank)
values = torch.randn(1001, dtype=torch.float64) * 10.0 ** torch.randint(-12, 12, (1001,))
total = world.all_sum(values)
out["sum"] = total.view(torch.int64).tolist()
out["tiny"] = world.all_sum(torch.tensor(1.0 + rank * 2.0**-50, dtype=torch.float64)).item()
out["bf16"] = world.all_sum(torch.full((3,), 1.5).bfloat16()).tolist()
out["ints"] = world.all_sum(torch.tensor([2**53 + rank])).tolist()
out["bool"] = world.all_sum(torch.tensor([rank == 1, False])).tolist()
out["scalar"] = list(world.all_sum(torch.tensor(1.0)).shape)
out["empty"] = list(world.all_sum(torch.empty(0, 3)).shape)
out["json"] = world.all_gather_json({"rank": rank, "x": [math.inf, 0.1] * rank, "text": "é" * rank})[1]["text"]
out["float"] = world.all_gather_json([-0.0, 5e-324, math.inf])[0] == [-0.0, 5e-324, math.inf]
rows = torch.full((rank * 2, 3), float(rank)).to(torch.bfloat16)   # rank 0 brings none
gathered = world.all_gather_rows(rows)
out["rows"] = [list(gathered.shape), str(gathered.dtype), gathered.float().sum().item()]
wide = world.all_gather_rows(torch.ones(1, 2 + rank, dtype=torch.int64), fill=-1)
out["wide"] = wide.tolist()
try:
    world.all_gather_rows(torch.ones(1, 2 + rank))
except WorldError as error:
    out["refused"] = str(error)
p = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)] + [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))]
p[0].grad = torch.tensor([1.0, 2.0]) * (rank + 1)
if rank == 1:
    p[1].grad = torch.tensor([5.0, 6.0])
p[3].grad = torch.tensor([1.0, 1e-17], dtype=torch.float64)
world.all_sum_gradients(p)
out["grads"] = [None if x.grad is None else x.grad.tolist() for x in p]
out["broadcast"] = world.broadcast_json({"seed": 7} if rank == 0 else None)
out["empty text"] = world.broadcast_json("" if rank == 0 else "x" * 100)
out["tensor"] = world.broadcast(torch.tensor([rank, 4.5]), source=1).tolist()
world.barrier("the end")
world.close()
world.close()
"""


def test_two_ranks_sum_gather_and_broadcast(answers: Answers) -> None:
    first, second = (dict(answers["sums"][rank]) for rank in range(2))
    messages = [str(answer.pop("refused")) for answer in (first, second)]
    assert all("pass fill=" in message for message in messages)
    assert first == second  # bitwise, the sum included
    parts = []
    for rank in range(2):
        torch.manual_seed(rank)
        parts.append(torch.randn(1001, dtype=torch.float64) * 10.0 ** torch.randint(-12, 12, (1001,)))
    assert first["sum"] == (parts[0] + parts[1]).view(torch.int64).tolist()
    assert first["tiny"] == 2.0 + 2.0**-50
    assert first["bf16"] == [3.0] * 3
    assert first["ints"] == [2**54 + 1]
    assert first["bool"] == [True, False]
    assert (first["scalar"], first["empty"]) == ([], [0, 3])
    assert (first["json"], first["float"]) == ("é", True)
    assert first["rows"] == [[2, 3], "torch.bfloat16", 6.0]
    assert first["wide"] == [[1, 1, -1], [1, 1, 1]]
    assert first["grads"] == [[3.0, 6.0], [5.0, 6.0], None, [2.0, 2e-17]]
    assert first["broadcast"] == {"seed": 7}
    assert (first["empty text"], first["tensor"]) == ("", [1.0, 4.5])


ORDER = """
# 1e16 + 1 - 1e16 depends on the order: ranks in order give 0, another order gives 1
value = torch.tensor([1e16, 1.0, -1e16][rank], dtype=torch.float64)
answer["sum"] = world.all_sum(value).item()
world.close()
"""


def test_three_ranks_add_in_the_order_of_the_ranks(answers: Answers) -> None:
    expected = (1e16 + 1.0) - 1e16
    assert expected == 0.0
    assert [answers["order"][rank]["sum"] for rank in range(3)] == [expected] * 3


DEAD = """
world.barrier("start")
began = time.monotonic()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    for _ in range(100):
        world.all_sum(torch.ones(3), name="counts of step 5")
except WorldError as error:
    answer["message"] = str(error)
    answer["seconds"] = time.monotonic() - began
"""

LATE = """
world.barrier("start")
if rank == 1:
    time.sleep(4)
else:
    began = time.monotonic()
    try:
        world.barrier("after rollouts", timeout_seconds=0.5)
    except WorldError as error:
        answer.update(message=str(error), seconds=time.monotonic() - began)
"""

ASTRAY = """
try:
    world.barrier("door" if rank == 0 else "window")
except WorldError as error:
    answer["message"] = str(error)
world.close()
"""

ALONE = """
try:
    World.here(timeout_seconds=1)
except WorldError as error:
    answer["message"] = str(error)
"""


def test_a_rank_that_dies_is_named_before_the_deadline(answers: Answers) -> None:
    assert set(answers["dead"]) == {0}
    message = answers["dead"][0]["message"]
    assert "'counts of step 5'" in message
    assert "no answer from rank 1" in message
    assert answers["dead"][0]["seconds"] < 15  # the deadline is 20


def test_a_rank_that_is_late_is_named_at_the_deadline(answers: Answers) -> None:
    assert answers["late"][1] == {}
    waiting = answers["late"][0]
    assert "'after rollouts'" in waiting["message"]
    assert "no answer from rank 1" in waiting["message"]
    assert 0.4 < waiting["seconds"] < 4.0


def test_ranks_at_different_barriers_are_told(answers: Answers) -> None:
    for rank in range(2):
        assert "['door', 'window']" in answers["astray"][rank]["message"]


def test_a_world_that_never_fills_says_so(answers: Answers) -> None:
    assert "rank 0 could not join 2 ranks at 127.0.0.1" in answers["alone"][0]["message"]
