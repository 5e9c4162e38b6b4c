"""PostgreSQL in place of SQLite: a server of its own for these tests, where its programs are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranked import all_rows, check_whole, filled, person, rank_next
from sqlalchemy import create_engine, text
from test_crowd import all_at_once, killed_in_the_middle

from posttrain.annotate import exports, figures, tables, turns
from posttrain.errors import ConfigError

PROGRAMS = [shutil.which(name) for name in ("initdb", "postgres")]
pytest.importorskip("psycopg", reason="psycopg is not installed")
pytestmark = pytest.mark.skipif(None in PROGRAMS, reason="no PostgreSQL server on this machine")


def ordinary_user() -> str | None:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server that listens on a socket in its own folder; what it keeps is removed."""
    user = ordinary_user()
    with tempfile.TemporaryDirectory() as folder:
        if user:
            shutil.chown(folder, user)
        data = Path(folder) / "data"
        initdb = [str(PROGRAMS[0]), "-D", str(data), "-U", "tester", "-A", "trust", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, user=user, cwd=folder)
        command = [str(PROGRAMS[1]), "-D", str(data), "-k", folder, "-c", "listen_addresses=", "-c", "max_connections=120"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, user=user, cwd=folder)
        try:
            url = f"postgresql://tester@/%s?host={folder}"
            for _ in range(200):
                try:
                    create_engine(url.replace("postgresql:", "postgresql+psycopg:") % "postgres").connect().close()
                    break
                except Exception:
                    assert process.poll() is None, "the server ended"
                    time.sleep(0.1)
            yield url
        finally:
            process.send_signal(signal.SIGQUIT)  # at once: others would wait for the connections to end
            process.wait()


@pytest.fixture
def database(address: str, request: pytest.FixtureRequest) -> str:
    """An empty database."""
    name = request.node.name.lower().replace("[", "_").replace("]", "")[:60]
    engine = create_engine(address.replace("postgresql:", "postgresql+psycopg:") % "postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    return address % name


def test_all_that_sqlite_does(database: str, tmp_path: Path) -> None:
    engine = filled(database, 4)
    assert str(engine.url).startswith("postgresql+psycopg://")
    for name in ("ada", "ben", "chi"):
        someone = person(engine, name)
        for _ in range(4):
            rank_next(engine, someone, [0, 1, 1] if name == "ada" else [0, 1, 2])
    ada = person(engine, "ada")
    undone = turns.undo(engine, ada, key="undo-key-1")
    assert undone == turns.undo(engine, ada, key="undo-key-1")
    rank_next(engine, ada, None, verdict="skip")
    assert turns.next_turn(engine, ada) is None
    with pytest.raises(turns.Conflict):
        turns.submit(engine, ada, item=1, key="again-and-again", verdict="bad")
    check_whole(engine)
    assert figures.figures(engine).rankings == 11
    assert exports.export(engine, "pairs", tmp_path / "p.jsonl") == 12
    assert exports.export(engine, "rankings", tmp_path / "k.jsonl") == 4
    assert exports.export(engine, "dataset", tmp_path / "d.jsonl") == 12
    assert len(all_rows(tables.opened(database, create=False), "rankings")) == 12


def test_many_at_once(database: str) -> None:
    all_at_once(database, annotators=10, items=8, each=2)


@pytest.mark.slow
def test_fifty_at_once_on_postgres(database: str) -> None:
    all_at_once(database, annotators=50, items=100, each=20)


@pytest.mark.slow
def test_a_killed_server_of_pages_loses_nothing(database: str) -> None:
    killed_in_the_middle(database, annotators=20, items=10, after=60)


def test_what_cannot_be_reached_is_said_without_the_password(address: str) -> None:
    with pytest.raises(ConfigError, match="does not exist") as caught:
        tables.opened(address.replace("tester@", "tester:secret@") % "missing")
    assert "secret" not in str(caught.value)
    assert "***" in str(caught.value)
