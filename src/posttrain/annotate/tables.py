"""The database of a ranking: six tables, the same on SQLite and PostgreSQL.

Every change is one transaction that begins by taking the one row of `turn`, so changes come one after another: what a
transaction reads stays true until it ends, and no two annotators are ever sent to the same place by a race.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError

from posttrain.errors import ConfigError, extra

VERSION = 1
"""Of the tables; a database of another version is refused."""

WAIT_SECONDS = 30
"""How long a connection waits for another one's change before it gives up."""

metadata = MetaData()

items = Table(
    "items",
    metadata,
    Column("id", Integer, primary_key=True),  # the order in which they came
    Column("digest", String(64), unique=True, nullable=False),  # of prompt and responses: an item is never there twice
    Column("prompt", Text, nullable=False),  # JSON: messages
    Column("responses", Text, nullable=False),  # JSON: a list of messages for each
    Column("models", Text, nullable=False),  # JSON: who wrote each, or null
    Column("info", Text, nullable=False),  # JSON: the row's other keys
    Column("labels", Integer, nullable=False),  # rankings that are no skips
    Column("disagreement", Float, nullable=False),  # see `agreement.disagreement`
)

annotators = Table(
    "annotators",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(80), unique=True, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(32), primary_key=True),  # the public half of a token
    Column("digest", String(64), nullable=False),  # sha256 of the secret half
    Column("annotator_id", ForeignKey("annotators.id"), nullable=False, index=True),
)

assignments = Table(
    "assignments",
    metadata,
    Column("annotator_id", ForeignKey("annotators.id"), primary_key=True),  # one open item each
    Column("item_id", ForeignKey("items.id"), nullable=False, index=True),
    Column("at", Float, nullable=False),  # seconds since 1970
)

rankings = Table(
    "rankings",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("item_id", ForeignKey("items.id"), nullable=False),
    Column("annotator_id", ForeignKey("annotators.id"), nullable=False, index=True),
    Column("verdict", String(8), nullable=False),  # order, bad or skip
    Column("places", Text),  # JSON: the place of each response, 0 is best, equal is tied; null for a skip
    Column("shown", Text),  # JSON: the responses in the order they stood on the page; null where not known
    Column("seconds", Float),  # from the first sight to the submission
    Column("at", Float, nullable=False),
    Column("key", String(64)),  # the submission's; null for what was imported
    UniqueConstraint("item_id", "annotator_id"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("what", String(8), nullable=False),  # ranked, undone or imported
    Column("annotator_id", ForeignKey("annotators.id"), nullable=False, index=True),
    Column("item_id", ForeignKey("items.id"), nullable=False),
    Column("key", String(64), unique=True),  # makes a request that is sent again the same request
    Column("detail", Text, nullable=False),  # JSON: the ranking
)

turn = Table(
    "turn",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("count", Integer, nullable=False),  # changes so far
)


def opened(database: str | Path, *, create: bool = True) -> Engine:
    """A database of rankings, made where there is none.

    Args:
        database: A file (SQLite), or `postgresql://user@host/name`.
        create: Make the file and the tables where they are missing.

    Raises:
        ConfigError: It cannot be opened, is missing where `create` is off, or is something else.
        MissingExtraError: PostgreSQL needs the extra `postgres`.
    """
    name = str(database)
    if "://" not in name and not create and not Path(name).is_file():
        raise ConfigError(f"there is no database {name!r}; `posttrain rank --database {name} --data rows.jsonl` makes one")
    engine = _engine(name)
    shown = engine.url.render_as_string(hide_password=True) if "://" in name else name
    try:
        if not inspect(engine).has_table("turn"):
            if not create:
                raise ConfigError(f"{shown} holds no rankings; name a database that `posttrain rank` made")
            _make(engine)
        with engine.connect() as connection:
            version = connection.execute(select(turn.c.version)).scalar_one()
    except DatabaseError as cause:
        reason = str(cause.orig).strip().splitlines()[0]
        raise ConfigError(f"{shown} cannot be opened: {reason}; expected a database that `posttrain rank` made") from cause
    if version != VERSION:
        raise ConfigError(f"{shown} has tables of version {version}; this version of posttrain reads {VERSION}")
    return engine


def _engine(name: str) -> Engine:
    if "://" not in name:
        if Path(name).is_dir() or not Path(name).resolve().parent.is_dir():
            raise ConfigError(f"--database {name}: expected a file in a folder that exists, or a postgresql:// URL")
        engine = create_engine(f"sqlite:///{name}", connect_args={"timeout": WAIT_SECONDS}, pool_size=8, max_overflow=40)
        event.listen(engine, "connect", _careful)
        return engine
    scheme, _, rest = name.partition("://")
    if scheme not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise ConfigError(f"--database {scheme}://...: expected a file (SQLite) or postgresql://user@host/name")
    extra("psycopg", "postgres")
    try:
        return create_engine(f"postgresql+psycopg://{rest}", pool_pre_ping=True, pool_size=8, max_overflow=40)
    except (ArgumentError, ValueError) as cause:
        raise ConfigError(
            f"--database {scheme}://... is no URL ({type(cause).__name__}); write postgresql://user@host/name"
        ) from None


def _careful(connection: Any, _: Any) -> None:
    """Readers never wait for a writer, a change is on the disk before it is acknowledged, and keys are checked."""
    cursor = connection.cursor()
    for line in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={WAIT_SECONDS * 1000}", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {line}")
    cursor.close()


def _make(engine: Engine) -> None:
    metadata.create_all(engine)
    try:
        with engine.begin() as connection:
            connection.execute(insert(turn).values(id=1, version=VERSION, count=0))
    except IntegrityError:
        pass  # another process made it at the same moment


@contextmanager
def changing(engine: Engine) -> Iterator[Connection]:
    """A transaction that nobody else changes anything during; it is whole and on the disk when it ends, or undone."""
    with engine.begin() as connection:
        connection.execute(update(turn).values(count=turn.c.count + 1))
        yield connection
