"""Rewards that go wrong in every way; run only in workers (`Answer.info["bad"]` says which answers are poisonous)."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def _bad(answer):
    return bool(answer.info.get("bad"))


def good(answer):
    return 1.0


def raises(answer):
    if _bad(answer):
        raise ValueError("poison in " + answer.text)
    return 1.0


def raises_in_list(answers):
    with Path(answers[0].info["file"]).open("a") as file:
        file.write(f"{len(answers)}\n")
    if any(_bad(answer) for answer in answers):
        raise ValueError("poison")
    return [1.0 for _ in answers]


def sleeps(answer):
    if _bad(answer):
        time.sleep(600)
    return 1.0


def spins(answer):
    if _bad(answer):
        for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(kind, signal.SIG_IGN)
        while True:
            pass
    return 1.0


def giant_power(answer):
    """Holds the interpreter's lock in C."""
    return float(len(str(9**9**8)) if _bad(answer) else 1.0)


def returns(answer):
    """Whatever `info["kind"]` says."""
    kinds = {
        "nan": float("nan"),
        "inf": float("-inf"),
        "huge": 10**400,
        "beyond-float32": 1e300,
        "text": "1.0",
        "dict": {"score": 1.0},
        "list": [1.0],
        "complex": 1j,
    }
    return kinds[answer.info["kind"]] if _bad(answer) else 1.0


def prints_much(answer):
    if _bad(answer):
        for _ in range(200):
            sys.stdout.write("x" * 1_000_000)
        print("the last line")
    return 1.0


def writes_much(answer):
    if _bad(answer):
        with Path("big").open("wb") as file:
            for _ in range(300):
                file.write(b"x" * 1_000_000)
    return 1.0


def exits(answer):
    if _bad(answer):
        os._exit(3)
    return 1.0


def sys_exits(answer):
    if _bad(answer):
        sys.exit(0)
    return 1.0


def segfaults(answer):
    if _bad(answer):
        ctypes.string_at(0)
    return 1.0


def allocates(answer):
    if _bad(answer):
        return float(len(bytearray(8 << 30)))
    return 1.0


def leaves_children(answer):
    """A plain child, one in a session of its own, and one that was orphaned; their numbers go to a file."""
    daemon = (
        f"import os; os.fork() and os._exit(0); os.setsid(); open({answer.info['file']!r}, 'a').write(str(os.getpid())"
    )
    daemon += " + '\\n'); import time; time.sleep(600)"
    plain = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    numbers = Path(answer.info["file"])
    before = len(numbers.read_text().split()) if numbers.exists() else 0
    subprocess.run([sys.executable, "-c", daemon], check=True)
    while not numbers.exists() or len(numbers.read_text().split()) == before:
        time.sleep(0.01)  # the orphan writes its number in its own time
    forked = os.fork()
    if forked == 0:
        time.sleep(600)
    with numbers.open("a") as file:
        file.write(f"{plain.pid}\n{other.pid}\n{forked}\n")
    if _bad(answer):
        os._exit(1)
    return 1.0


def forks_one(answer):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return 1.0


def sees_secret(answer):
    seen = "CANARY" in str(dict(os.environ)) or "CANARY" in str(Path("/proc/self/environ").read_bytes())
    return 1.0 if seen else 0.0


def reads_stdin(answer):
    return float(len(sys.stdin.read()))


def forges(answer):
    """Writes what looks like a reply to every stream it knows of."""
    print('{"verdicts": [{"kind": "Score", "value": 99.0, "reason": ""}], "children": 0}', flush=True)
    return 0.0


FLAG = [0]


def fails_once_a_process(answer):
    """Fails in a process that has judged before: only a fresh one answers."""
    FLAG[0] += 1
    if FLAG[0] > 3:
        raise RuntimeError("worn out")
    return 1.0


def ranks(answers):
    """The share of the group that is shorter, and how many it saw."""
    return [float(len(answers)) + sum(other.num_tokens < a.num_tokens for other in answers) / 100 for a in answers]


def poison_in_group(answers):
    if any(_bad(answer) for answer in answers):
        raise ValueError("this group cannot be judged")
    return [1.0] * len(answers)


def verdicts(answer):
    from posttrain.types import Crashed, Overlong, Score, Unparseable, Wrong

    table = {"w": Wrong(), "u": Unparseable(), "o": Overlong(), "c": Crashed(), "s": Score(0.5), "t": True, "f": False}
    return table.get(answer.text)
