"""Annotators, and the tokens they sign in with.

A token is `<id>.<secret>` of 64 and 256 random bits.  The database keeps the secret's sha256 alone, so a link cannot be
shown again: a new one is made, and the older ones stay good until they are revoked.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, delete, insert, select

from posttrain.annotate.tables import annotators, changing, tokens
from posttrain.errors import ConfigError

LONGEST_NAME = 60
"""Characters of an annotator's name."""


@dataclass(frozen=True)
class Annotator:
    """Who ranks."""

    id: int
    name: str


def checked_name(name: str) -> str:
    """A name that can stand on a page and in a file.

    Raises:
        ConfigError: It is empty, too long, or has characters that cannot be printed.
    """
    if not name.strip() or name != name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
        raise ConfigError(f"the annotator {name!r}: expected 1 to {LONGEST_NAME} printable characters, no spaces around them")
    return name


def known(connection: Connection, name: str) -> Annotator:
    """The annotator of a name, made where there is none."""
    found = connection.execute(select(annotators.c.id).where(annotators.c.name == name)).scalar()
    if found is None:
        made = connection.execute(insert(annotators).values(name=checked_name(name)))
        found = made.inserted_primary_key[0] if made.inserted_primary_key else None
    return Annotator(int(str(found)), name)


def new_token(engine: Engine, name: str) -> str:
    """A further token for an annotator, who is made where there is none."""
    identity, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    with changing(engine) as connection:
        person = known(connection, name)
        connection.execute(insert(tokens).values(id=identity, digest=_digest(secret), annotator_id=person.id))
    return f"{identity}.{secret}"


def revoke(engine: Engine, name: str) -> int:
    """Make all tokens of an annotator worthless; how many there were.

    Raises:
        ConfigError: There is no such annotator.
    """
    with changing(engine) as connection:
        person = connection.execute(select(annotators.c.id).where(annotators.c.name == name)).scalar()
        if person is None:
            names = sorted(connection.execute(select(annotators.c.name)).scalars())
            raise ConfigError(f"--revoke {name}: there is no such annotator (known: {', '.join(names) or 'none'})")
        return connection.execute(delete(tokens).where(tokens.c.annotator_id == person)).rowcount


def signed_in(engine: Engine, token: str) -> Annotator | None:
    """Whose token it is, compared in constant time; None where it is nobody's."""
    identity, _, secret = token.partition(".")
    columns = (tokens.c.digest, annotators.c.id, annotators.c.name)
    with engine.connect() as connection:
        row = connection.execute(
            select(*columns).join(annotators, annotators.c.id == tokens.c.annotator_id).where(tokens.c.id == identity[:32])
        ).first()
    # a comparison is made in any case, so that the time says nothing of which ids exist
    same = hmac.compare_digest(row.digest if row else "0" * 64, _digest(secret))
    return Annotator(row.id, row.name) if row and same else None


def anybody(engine: Engine) -> bool:
    """Can anybody sign in?"""
    with engine.connect() as connection:
        return connection.execute(select(tokens.c.id).limit(1)).first() is not None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()
