"""Saves under every fault that can be injected: killed, torn, altered, refused by the disk."""

from __future__ import annotations

import errno
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from posttrain import files, tensor_file
from posttrain.errors import CheckpointError, ConfigError
from posttrain.exact_json import dumps, loads
from posttrain.manifest import Manifest
from posttrain.state import (
    Saved,
    atomic_folder,
    atomic_write,
    hash_files,
    hash_folder,
    load_state,
    run_lock,
    save_state,
    whole,
    why_not_whole,
    write_manifest,
)

SOURCE = Path(__file__).resolve().parents[1] / "src"


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test may act on the disk after it."""


def tensors_of(step: int) -> dict[str, Tensor]:
    """A small state that differs at every step."""
    generator = torch.Generator().manual_seed(step)
    return {"weight": torch.randn(16, 8, generator=generator), "step": torch.tensor(step), "rng": generator.get_state()}


def save(folder: Path, step: int, *, keep: int = 2) -> Path:
    """The save of a step as these tests know it."""
    values = {"step": step, "loss": step / 3}
    return save_state(folder, step, tensors_of(step), values, keep=keep, identity={"model": "tiny"})


def check(saved: Saved | None, *allowed: int) -> int:
    """The state is exactly that of one of the allowed steps."""
    assert saved is not None
    assert saved.step in allowed
    expected = tensors_of(saved.step)
    assert set(saved.tensors) == set(expected)
    assert all(torch.equal(saved.tensors[name], expected[name]) for name in expected)
    assert saved.values == {"step": saved.step, "loss": saved.step / 3}
    return saved.step


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated crashes need the order of operations, not a slow disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# --------------------------------------------------------------------------------------------------------------
# What comes back.


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def test_every_dtype_shape_and_name_comes_back_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    noise = torch.randint(0, 2, (4, 16), dtype=torch.uint8)
    held = {f"dtype/{code}": (noise if code == "BOOL" else torch.randint(0, 256, (4, 16), dtype=torch.uint8)).view(dtype)
            for code, dtype in tensor_file.DTYPES.items()}  # fmt: skip
    held |= {
        "": torch.tensor(math.nan, dtype=torch.bfloat16),
        "__metadata__": torch.tensor(True),
        "\\__metadata__": torch.arange(3),
        'naïve "quoted"\n模型 🙂': torch.randn(2, 3).t(),
        "empty": torch.empty(0, 3, dtype=torch.int64),
        "strided": torch.randn(8, 8)[::2, 1::3],
        "expanded": torch.ones(1).expand(5),
        "needs grad": torch.nn.Parameter(torch.randn(3)),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    }
    path = save_state(tmp_path, 42, held, {})
    saved = load_state(tmp_path)
    assert saved is not None
    assert path == saved.path == tmp_path / "step-00000042"
    assert list(saved.tensors) != []
    assert {name for name in held if not same_bits(saved.tensors[name], held[name].detach().resolve_conj())} == set()
    assert set(saved.tensors) == set(held)
    elsewhere = load_file(path / "state.safetensors")  # any reader of the format opens it
    assert torch.equal(elsewhere["strided"], held["strided"])
    assert "\\__metadata__" in elsewhere
    saved.tensors["strided"].add_(1)  # what is loaded is the caller's own memory
    check_again = load_state(tmp_path)
    assert check_again is not None
    assert torch.equal(check_again.tensors["strided"], held["strided"])


def test_a_tensor_of_many_chunks_is_streamed_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 1000)
    big = torch.randn(5000)
    writes: list[int] = []

    def watch(operation: files.Operation) -> None:
        if operation.data is not None and operation.path.suffix == ".safetensors":
            writes.append(len(operation.data))

    with files.watched(watch):
        save_state(tmp_path, 1, {"big": big}, {})
    saved = load_state(tmp_path)
    assert saved is not None
    assert torch.equal(saved.tensors["big"], big)
    assert len(writes) == 21  # the header and 20 pieces
    assert max(writes) == 1000


def test_json_values_come_back_exactly(tmp_path: Path) -> None:
    randomly = random.Random(0)
    floats = [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf] + [
        randomly.uniform(-1, 1) * 10.0 ** randomly.randint(-300, 300) for _ in range(200)
    ]
    values = {
        "floats": floats,
        "ints": [2**63, -(2**127), 0],
        "kinds": [True, 1, 1.0, None, ""],
        "nested": {"a": [{"b": [[]]}, {}], "": {"é\ud800\0": "\u2028"}},
        "$float": {"$float": "inf"},
        "$$x": {"$float": 1, "y": 2},
    }
    save_state(tmp_path, 0, {}, {**values, "nan": math.nan})
    saved = load_state(tmp_path)
    assert saved is not None
    assert saved.tensors == {}
    assert math.isnan(saved.values.pop("nan"))
    assert saved.values == values
    assert [math.copysign(1, x) for x in saved.values["floats"]] == [math.copysign(1, x) for x in floats]
    assert [type(x) for x in saved.values["kinds"]] == [bool, int, float, type(None), str]
    with pytest.raises(ValueError, match="bare NaN"):
        loads("[NaN]")
    assert "NaN" not in dumps(math.nan)


@pytest.mark.parametrize(
    ("tensors", "values", "message"),
    [
        ({}, {"a": {"b": [0, (1, 2)]}}, r"value\['a'\]\['b'\]\[1\] is of type tuple.*write list"),
        ({}, {"a": {1: 2}}, r"has the key 1 of type int.*write str"),
        ({}, {"a": torch.ones(1)}, r"put tensors among the tensors"),
        ({"s": torch.ones(2, 2).to_sparse()}, {}, r"'s' is torch.float32, torch.sparse_coo; expected a dense tensor"),
        ({"\ud800": torch.ones(1)}, {}, r"surrogates not allowed"),
    ],
)
def test_what_cannot_come_back_is_refused_and_leaves_nothing(
    tmp_path: Path, tensors: dict[str, Tensor], values: dict[str, object], message: str
) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=message):
        save_state(tmp_path, 2, tensors, values)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_no_save_is_none_and_settings_are_checked(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    assert load_state(tmp_path / "nowhere") is None
    for step, keep in ((-1, 2), (1, 0)):
        with pytest.raises(CheckpointError, match="expected step >= 0 and keep >= 1"):
            save_state(tmp_path, step, {}, {}, keep=keep)


# --------------------------------------------------------------------------------------------------------------
# Which saves are kept and loaded.


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=keep)
        assert check(load_state(tmp_path), step) == step
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:08d}" for step in range(6 - keep, 6)]


def test_a_step_saved_twice_is_replaced(tmp_path: Path) -> None:
    save_state(tmp_path, 7, {}, {"try": 1})
    save_state(tmp_path, 7, {}, {"try": 2})
    saved = load_state(tmp_path)
    assert saved is not None
    assert saved.values == {"try": 2}
    assert os.listdir(tmp_path) == ["step-00000007"]


def test_a_later_whole_save_is_never_overtaken_but_a_torn_one_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    with pytest.raises(CheckpointError, match="a whole save of a later step than 9; load it"):
        save(tmp_path, 9)
    (save(tmp_path, 11) / "state.json").unlink()
    assert check(load_state(tmp_path), 10) == 10
    save(tmp_path, 11)
    (tmp_path / "step-00000012").mkdir()
    save(tmp_path, 11)
    assert sorted(os.listdir(tmp_path)) == ["step-00000010", "step-00000011"]
    assert "step-00000012 is not whole and is removed" in caplog.text


def test_a_torn_save_does_not_count_among_the_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "step-00000003" / "manifest.json").write_bytes(b"")
    save(tmp_path, 4, keep=3)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002", "step-00000004"]


def test_another_identity_is_refused_with_both(tmp_path: Path) -> None:
    save_state(tmp_path, 1, {}, {}, identity={"model": "aaa", "beta": 0.1})
    assert load_state(tmp_path, identity={"beta": 0.1, "model": "aaa"}) is not None
    assert load_state(tmp_path) is not None
    with pytest.raises(CheckpointError, match=r"(?s)'aaa'.*'bbb'"):
        load_state(tmp_path, identity={"model": "bbb", "beta": 0.1})


def test_a_save_under_another_name_or_version_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000009")
    assert check(load_state(tmp_path), 1) == 1
    assert "step-00000009 is not whole" in caplog.text
    manifest = tmp_path / "step-00000009" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    caplog.clear()
    assert check(load_state(tmp_path), 1) == 1
    assert "version 2; expected 'posttrain' version 1" in caplog.text


def test_the_files_of_two_saves_cannot_be_swapped(tmp_path: Path) -> None:
    for step in (3, 4):
        save(tmp_path, step)
    for name in ("state.safetensors", "state.json"):
        a, b = tmp_path / "step-00000003" / name, tmp_path / "step-00000004" / name
        content = a.read_bytes(), b.read_bytes()
        a.write_bytes(content[1])
        assert check(load_state(tmp_path), 4) == 4
        b.write_bytes(content[0])
        with pytest.raises(CheckpointError, match="holds 2 saves and none is whole"):
            load_state(tmp_path)
        a.write_bytes(content[0])
        b.write_bytes(content[1])


# --------------------------------------------------------------------------------------------------------------
# Damage.


@pytest.mark.usefixtures("unsynced")
def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "posttrain")
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    randomly = random.Random(1)
    tried = found = 0
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for number in range(150):
            damaged = bytearray(good)
            if number % 3 == 2:
                del damaged[randomly.randrange(len(good)) :]
            else:
                # The first bytes hold lengths and names: every second flip goes there.
                reach = min(len(good), 64) if number % 2 else len(good)
                damaged[randomly.randrange(reach)] ^= 1 << randomly.randrange(8)
            file.write_bytes(damaged)
            tried += 1
            found += check(load_state(tmp_path), 1, 2) == 1
        for extra in (b"\n", b"\0" * 8):
            file.write_bytes(good + extra)
            tried += 1
            found += check(load_state(tmp_path), 1, 2) == 1
        file.unlink()
        assert check(load_state(tmp_path), 1) == 1
        file.write_bytes(good)
        assert check(load_state(tmp_path), 2) == 2
    assert tried == found == 456


def test_damage_is_named_and_without_a_whole_save_it_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert check(load_state(tmp_path), 1) == 1
    (record,) = [record for record in caplog.records if record.name == "posttrain"]
    assert record.levelname == "WARNING"
    assert "step-00000002 is not whole and is not used (state.safetensors has" in record.getMessage()
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds 2 saves and none is whole.*remove the folder to start over"):
        load_state(tmp_path)


# --------------------------------------------------------------------------------------------------------------
# Crashes.  One save is recorded operation by operation; then the disk is rebuilt as a crash could leave it.


@dataclass
class Recorder:
    """Keeps every operation with a copy of its bytes."""

    operations: list[files.Operation] = field(default_factory=list)

    def __call__(self, operation: files.Operation) -> None:
        data = None if operation.data is None else memoryview(bytes(operation.data))
        self.operations.append(files.Operation(operation.kind, operation.path, operation.target, data))


def replay(operations: list[files.Operation], home: Path, copy: Path, *, half: bool = False) -> None:
    """Do to `copy` what was done to `home`; `half`: of the last write only half the bytes arrive."""
    for number, operation in enumerate(operations):
        path = copy / operation.path.relative_to(home)
        if operation.kind == "make_folder":
            path.mkdir(exist_ok=True)
        elif operation.kind == "create":
            path.touch(exist_ok=False)
        elif operation.kind == "write":
            assert operation.data is not None
            torn = half and number == len(operations) - 1
            with path.open("ab") as file:
                file.write(operation.data[: len(operation.data) // 2] if torn else operation.data)
        elif operation.kind == "rename":
            assert operation.target is not None
            os.replace(path, copy / operation.target.relative_to(home))
        elif operation.kind == "remove":
            path.unlink()
        elif operation.kind == "remove_folder":
            shutil.rmtree(path)  # its entries went with it, synced or not


def lose_unsynced(operations: list[files.Operation], how: str) -> list[files.Operation]:
    """What a power loss can leave: bytes of files without a later fsync, and names without one of their folder, are lost.

    `how`: "bytes" (names arrived, bytes did not), "zeros" (sizes arrived, bytes are zeros) or "names".
    """
    kept: list[files.Operation] = []
    absent: set[Path] = set()  # files whose name was lost
    for number, operation in enumerate(operations):
        later = operations[number + 1 :]
        if operation.kind == "write":
            synced = any(other.kind == "sync" and other.path == operation.path for other in later)
            if operation.path in absent or (not synced and how == "bytes"):
                continue
            if not synced and how == "zeros":
                assert operation.data is not None
                zeros = memoryview(bytes(len(operation.data)))
                kept.append(files.Operation("write", operation.path, None, zeros))
                continue
        # What changes in one folder is kept in order, so an operation is lost with all that follow it there.
        synced = any(other.kind == "sync_folder" and other.path == operation.path.parent for other in later)
        if how == "names" and not synced and operation.kind not in ("write", "sync", "sync_folder"):
            absent |= {operation.path} if operation.kind == "create" else set()
            continue
        kept.append(operation)
    return kept


def crash_states(home: Path, before: Path, operations: list[files.Operation], room: Path) -> Iterator[tuple[int, Path]]:
    """Every disk that a crash during `operations` could leave, with the number of operations done."""
    for done in range(len(operations) + 1):
        prefix = operations[:done]
        variants = {"done": (prefix, False)}
        if prefix and prefix[-1].kind == "write":
            variants["half"] = (prefix, True)
        variants |= {how: (lose_unsynced(prefix, how), False) for how in ("bytes", "zeros", "names")}
        for name, (kept, half) in variants.items():
            copy = room / f"{done}-{name}"
            shutil.copytree(before, copy)
            replay(kept, home, copy, half=half)
            yield done, copy


def recorded(home: Path, before: Path, action: Callable[[], object]) -> list[files.Operation]:
    """The operations of `action`, and the folder as it was before them."""
    shutil.copytree(home, before)
    recorder = Recorder()
    with files.watched(recorder):
        action()
    return recorder.operations


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize(("case", "keep"), [("first", 2), ("next", 2), ("next", 1), ("again", 1), ("swept", 2)])
def test_after_a_crash_anywhere_the_old_or_the_new_state_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str, keep: int
) -> None:
    caplog.set_level(logging.ERROR, "posttrain")
    home = tmp_path / "home"
    home.mkdir()
    if case != "first":
        save(home, 1, keep=keep)
        save(home, 2, keep=keep)
    if case == "swept":  # a dead writer's leftovers, and a save that was set aside
        shutil.copytree(home / "step-00000002", home / ".step-00000003.partial-999999999")
        os.rename(home / "step-00000002", home / ".step-00000002.replaced")
    new = 2 if case == "again" else 3
    operations = recorded(home, tmp_path / "before", lambda: save(home, new, keep=keep))
    committed = max(n for n, o in enumerate(operations) if o.kind == "rename" and o.target == home / f"step-{new:08d}")
    tried = 0
    for done, copy in crash_states(home, tmp_path / "before", operations, tmp_path):
        saved = load_state(copy)
        if case == "first" and saved is None:
            assert done <= committed + 1
        else:
            step = check(saved, 2, new)
            assert step == new or done <= committed + 1  # durable one operation later, when the parent is synced
        save(copy, 4, keep=keep)  # whatever was left, the run goes on and cleans up
        assert check(load_state(copy), 4) == 4
        assert not [name for name in os.listdir(copy) if name.startswith(".")]
        shutil.rmtree(copy)
        tried += 1
    assert tried > 60


def test_a_process_killed_at_every_operation_resumes(tmp_path: Path) -> None:
    """The same with real SIGKILLs, through the variable that people can set; forks of one process save."""
    body = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests_state import save
os.fsync = lambda handle: None  # SIGKILL loses no bytes that were written
home = Path(sys.argv[1])
for number in range(1, 100):
    folder = home / str(number)
    child = os.fork()
    if child == 0:
        save(folder, 1)
        os.environ["POSTTRAIN_KILL_AT"] = f"save:2:{number}"
        save(folder, 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(number, status, flush=True)
    if status == 0:
        break
"""
    (tmp_path / "tests_state.py").write_text(Path(__file__).read_text())
    environment = {**os.environ, "PYTHONPATH": f"{SOURCE}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", body, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True)
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) > 12
    assert [status for _, status in lines] == [signal.SIGKILL] * (len(lines) - 1) + [0]
    loaded = [check(load_state(tmp_path / str(number)), 1, 2) for number, _ in lines]
    assert loaded == sorted(loaded)
    assert {1, 2} == set(loaded)


def test_kills_at_random_moments_never_tear(tmp_path: Path) -> None:
    body = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from posttrain.state import load_state, save_state
folder = Path(sys.argv[1])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        saved = load_state(folder)
        step = saved.step if saved else 0
        if saved:
            assert torch.equal(saved.tensors["x"], torch.full((200_000,), float(step)))
            assert saved.values == {"step": step}
        os.write(1, b"ready\\n")
        while True:
            step += 1
            save_state(folder, step, {"x": torch.full((200_000,), float(step))}, {"step": step})
            os.write(1, b"saved\\n")
    os.write(1, b"%d\\n" % child)
    os.waitpid(child, 0)
    os.write(1, b"gone\\n")
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", body, str(tmp_path / "run")]
    randomly = random.Random(3)
    steps, seconds = [0], 0.05
    parent = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = 0
    try:
        assert parent.stdin is not None
        assert parent.stdout is not None
        answer = parent.stdout
        for number in range(20):
            parent.stdin.write("go\n")
            parent.stdin.flush()
            words = [answer.readline().strip(), answer.readline().strip()]
            while not any(word.isdigit() for word in words):  # the child may speak before its number is known
                words.append(answer.readline().strip())
            (child,) = [int(word) for word in words if word.isdigit()]
            assert "ready" in words  # "gone" would mean that the loader failed
            began = time.monotonic()
            for _ in range(number % 3):  # none, one or two saves, then some way into the next
                assert answer.readline().strip() == "saved"
            seconds = (time.monotonic() - began) / (number % 3) if number % 3 else seconds
            time.sleep(randomly.uniform(0.0, 1.2 * seconds))
            os.kill(child, signal.SIGKILL)
            while (word := answer.readline().strip()) != "gone":
                assert word == "saved"
            child = 0
            saved = load_state(tmp_path / "run")
            if saved is not None:
                assert torch.equal(saved.tensors["x"], torch.full((200_000,), float(saved.step)))
                steps.append(saved.step)
        parent.stdin.close()
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
        parent.kill()
        parent.wait()
    assert steps == sorted(steps)
    assert steps[-1] >= sum(number % 3 for number in range(20))  # the saves that were waited for


def test_a_wrong_kill_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for plan in ("save", "save:0:1", "save:1:flush"):
        monkeypatch.setenv(files.KILL_VARIABLE, plan)
        with pytest.raises(ConfigError, match="expected for instance 'save:3:7'"):
            save(tmp_path, 1)


# --------------------------------------------------------------------------------------------------------------
# Disks that refuse.


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_at_any_operation_leaves_the_older_saves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    caplog.set_level(logging.ERROR, "posttrain")
    home = tmp_path / "home"
    for step in (1, 2):
        save(home, step)
    operations = recorded(home, tmp_path / "before", lambda: save(home, 3))
    refused = 0
    for number in range(len(operations)):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "before", copy)
        seen = 0

        def refuse(operation: files.Operation, number: int = number) -> None:
            nonlocal seen
            seen += 1
            if seen == number + 1:
                raise OSError(code, os.strerror(code), str(operation.path))

        error = None
        with files.watched(refuse):
            try:
                save(copy, 3)
            except CheckpointError as caught:
                error = str(caught)
        names = sorted(os.listdir(copy))
        if error is None:  # refused while the oldest was removed: the save is done, the rest is a warning
            assert check(load_state(copy), 3) == 3
        else:
            refused += 1
            assert "step 3 could not be saved" in error or "could not be made" in error
            assert ("the disk is full" in error) == (code in (errno.ENOSPC, errno.EDQUOT))
            assert {"step-00000001", "step-00000002"} <= set(names)
            assert not [name for name in names if "partial" in name]
            check(load_state(copy), 2, 3)
        save(copy, 4)
        assert sorted(os.listdir(copy))[-1] == "step-00000004"
        assert len(os.listdir(copy)) == 2
        shutil.rmtree(copy)
    assert refused > 10


def test_a_really_full_file_system_is_called_full(tmp_path: Path) -> None:
    """The limit on a file's size stands for a full disk: the system itself refuses the write."""
    body = """
import resource, signal, sys
from pathlib import Path
import torch
from posttrain.errors import CheckpointError
from posttrain.state import save_state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save_state(Path(sys.argv[1]), 1, {"x": torch.ones(10)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save_state(Path(sys.argv[1]), 2, {"x": torch.ones(100_000)}, {})
except CheckpointError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", body, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "the disk is full" in done.stdout
    assert "older saves, untouched: step-00000001" in done.stdout
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_disk_that_alters_bytes_is_found_before_the_save_counts(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def alter(operation: files.Operation) -> None:
        if operation.kind == "sync" and operation.path.name == "state.safetensors":
            with operation.path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\xff")

    with files.watched(alter), pytest.raises(CheckpointError, match=r"state.safetensors read back differently"):
        save(tmp_path, 2)
    assert os.listdir(tmp_path) == ["step-00000001"]


# --------------------------------------------------------------------------------------------------------------
# Files, folders, manifests, locks.


@pytest.mark.usefixtures("unsynced")
def test_a_file_is_old_or_new_after_a_crash_anywhere(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    atomic_write(home / "a.json", "old" * 100)
    operations = recorded(home, tmp_path / "before", lambda: atomic_write(home / "a.json", b"new" * 100))
    seen = set()
    for _, copy in crash_states(home, tmp_path / "before", operations, tmp_path):
        seen.add((copy / "a.json").read_text())
        atomic_write(copy / "a.json", "next")
        if not any("partial" in name for name in os.listdir(copy)):
            assert os.listdir(copy) == ["a.json"]
    assert seen == {"old" * 100, "new" * 100}


@pytest.mark.usefixtures("unsynced")
def test_a_folder_is_old_or_new_or_set_aside_after_a_crash_anywhere(tmp_path: Path) -> None:
    home = tmp_path / "home"

    def build(text: str, at: Path = home) -> None:
        with atomic_folder(at / "data") as folder:
            (folder / "below").mkdir()
            (folder / "below" / "rows.jsonl").write_text(text)
            write_manifest(folder, {"text": text})

    build("old")
    shutil.copytree(home, tmp_path / "before")
    states = set()
    for number in range(1, 100):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "before", copy)
        seen = 0

        def kill(operation: files.Operation, number: int = number) -> None:
            nonlocal seen
            seen += 1
            if seen >= number:  # and nothing that follows happens either
                raise Killed

        try:
            with files.watched(kill):
                build("new", copy)
        except Killed:
            states.add((whole(copy / "data", {"text": "old"}), whole(copy / "data", {"text": "new"})))
            build("next", copy)
            assert whole(copy / "data", {"text": "next"})
            assert os.listdir(copy) == ["data"]
        else:
            break
    assert number > 12
    assert states == {(True, False), (False, False), (False, True)}  # in between it is made again, never half used


def test_a_folder_whose_block_raises_does_not_appear(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "x" / "data") as folder:
            (folder / "a").write_text("a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path / "x") == []
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    build = atomic_folder(tmp_path / "data")
    build.__enter__()
    with pytest.raises(CheckpointError, match="the disk is full"):
        build.__exit__(type(full), full, None)


def test_leftovers_of_the_living_stay_and_of_the_dead_go(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as living:
        alive = tmp_path / f".data.partial-{living.pid}"
        own = tmp_path / f".data.partial-{os.getpid()}"
        dead = tmp_path / ".data.partial-999999999"
        other = tmp_path / ".other.partial-999999999"
        for path in (alive, own, dead, other):
            path.mkdir()
            (path / "big").write_text("x")
        with atomic_folder(tmp_path / "data"):
            assert sorted(os.listdir(tmp_path)) == sorted({alive.name, own.name, other.name})
            assert os.listdir(own) == []
        living.kill()


def test_a_link_among_leftovers_is_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    leftover = tmp_path / ".data.partial-999999999"
    leftover.mkdir()
    (leftover / "link").symlink_to(tmp_path / "precious")
    with atomic_folder(tmp_path / "data"):
        pass
    assert (tmp_path / "precious" / "file").exists()
    assert not leftover.exists()


def test_an_artifact_is_whole_only_undamaged_and_from_the_same_inputs(tmp_path: Path) -> None:
    inputs = {"seed": 1, "data": "abc", "beta": 0.1}
    folder = tmp_path / "artifact"
    (folder / "sub").mkdir(parents=True)
    assert "has no manifest.json" in why_not_whole(folder)
    (folder / "sub" / "rows.jsonl").write_text("{}\n")
    (folder / "model").write_bytes(b"\0" * 100)
    (folder / ".hidden").write_text("ignored")
    before = hash_folder(folder)
    write_manifest(folder, inputs, info={"rows": 1})
    assert hash_folder(folder) == before
    assert sorted(hash_files(folder)) == ["model", "sub/rows.jsonl"]
    assert whole(folder)
    assert whole(folder, dict(reversed(inputs.items())))
    for changed in (
        {**inputs, "seed": 2},
        {**inputs, "seed": 1.0},
        {**inputs, "new": None},
        {"seed": 1, "data": "abc"},
    ):
        assert "was made from other inputs" in why_not_whole(folder, changed)
    (folder / "model").write_bytes(b"\0" * 99 + b"\1")
    assert "model is damaged" in why_not_whole(folder, inputs)
    (folder / "model").write_bytes(b"\0" * 100)
    (folder / "shard-2").write_text("")
    assert "does not know: ['shard-2']" in why_not_whole(folder, inputs)
    os.replace(folder / "shard-2", folder / "model")
    assert "damaged" in why_not_whole(folder, inputs)
    (folder / "model").unlink()
    assert "lacks ['model']" in why_not_whole(folder, inputs)
    assert "does not exist" in why_not_whole(tmp_path / "nowhere", inputs)
    with pytest.raises(CheckpointError, match="there is no folder"):
        hash_folder(tmp_path / "nowhere")


def test_a_hash_of_a_folder_depends_on_names_and_bytes_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("x")
    assert hash_folder(tmp_path / "one") == hash_folder(tmp_path / "two")
    os.rename(tmp_path / "two" / "a", tmp_path / "two" / "b")
    assert hash_folder(tmp_path / "one") != hash_folder(tmp_path / "two")


def test_a_foreign_manifest_is_not_one() -> None:
    for content in (b"", b"{}", b"[]", b"null", b'{"format": "x", "version": 1}', b"\xff", b"[" * 100_000):
        with pytest.raises(ValueError):
            Manifest.decoded(content)


def test_one_process_writes_a_run_and_death_frees_it(tmp_path: Path) -> None:
    body = (
        "import sys, time\nfrom posttrain.state import run_lock\n"
        "with run_lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", body, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    run = tmp_path / "run"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"another process \(pid {other.pid} on "), run_lock(run):
            pass
        other.kill()
        other.wait()
        with run_lock(run):
            assert str(os.getpid()) in (run / ".lock").read_text()
            again = run_lock(run)
            with pytest.raises(CheckpointError, match="already being written by this process"):
                again.__enter__()
    with run_lock(run):
        pass
