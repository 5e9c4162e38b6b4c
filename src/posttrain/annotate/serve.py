"""What `posttrain rank` does: fill the database, print the links, serve the pages; or export."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError, extra, nearest

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from posttrain.annotate.items import Item

DEFAULT_ANNOTATOR = "me"


def rank(action: str, database: str, *, source: Mapping[str, Any], people: Mapping[str, Any], kind: str, out: Path | None) -> None:
    """The command.

    Args:
        action: `serve` or `export`.
        database: See `tables.opened`.
        source: The arguments of `items_to_rank`.
        people: `annotators`, `revoked`, `host` and `port`.
        kind: What to export.
        out: Where to.

    Raises:
        ConfigError: There is no such action, or the options do not fit together.
        MissingExtraError: The extra `annotate` is not installed.
    """
    for module in ("sqlalchemy", "starlette", "uvicorn"):
        extra(module, "annotate")
    if action == "export":
        given = {"--data": source["data"], "--task": source["task"], "--model": source["models"], "--count": source["count"]}
        given |= {"--annotator": people["annotators"], "--revoke": people["revoked"]}
        if useless := [name for name, value in given.items() if value]:
            raise ConfigError(f"{useless[0]} has no effect on an export; leave it out")
        export(database, kind, out)
        return
    if action != "serve":
        raise ConfigError(f"posttrain rank {action}: there is no such action{nearest(action, ('serve', 'export'))}")
    if out is not None:
        raise ConfigError(f"--out {out} is for exports; write posttrain rank export --as {kind} --out {out}")
    from posttrain.annotate.items import add
    from posttrain.annotate.people import revoke
    from posttrain.annotate.tables import opened

    found = items_to_rank(**source)
    engine = opened(database)
    if found:
        added = add(engine, found)
        print(f"{added.items} new items and {added.comparisons} comparisons; {added.total} items in all")
    for name in people["revoked"]:
        print(f"{revoke(engine, name)} links of {name} are worthless now")
    serve(engine, annotators=people["annotators"], host=people["host"], port=people["port"])


def items_to_rank(
    *,
    data: str | None,
    task: str | None,
    models: Sequence[str],
    samples: int,
    count: int | None,
    rename: Sequence[str],
    settings: Sequence[str],
    seed: int,
    skip_invalid: bool,
) -> list[Item]:
    """The items that the options name: of a file, or written by models now; none where they name nothing.

    Raises:
        ConfigError: The options do not fit together.
    """
    if not models:
        from posttrain.annotate.items import read_items

        if task is not None:
            raise ConfigError(f"--task {task} gives prompts, and nobody answers them; give --model (repeat for more)")
        if settings:
            raise ConfigError(f"{settings[0]}: a setting of the sampler, and nothing is sampled; give --model, or leave it out")
        if data is None:
            return []
        return read_items(data, rename=_renamed(rename), limit=count, skip_invalid=skip_invalid)
    from posttrain.annotate.sampling import task_sampling, written_items
    from posttrain.data.rows import load_rows
    from posttrain.options import parsed
    from posttrain.quick import named_task, reads_file

    if data is None and task is None:
        raise ConfigError("--model is given and nothing to answer; give --data prompts.jsonl or --task NAME")
    of_task = task is not None and (data is None or reads_file(task))
    if task is not None and not of_task:
        raise ConfigError("--data and --task each name the prompts; give one of them")
    given = named_task(task, data) if task is not None else None
    if given is not None:
        rows = list(given.rows("test", count or 50, seed))
    else:
        rows = load_rows(str(data), rename=_renamed(rename), limit=count, skip_invalid=skip_invalid)
    sampling = task_sampling(None if given is None else given.max_tokens, parsed(settings))
    return written_items(rows, models, samples=samples, sampling=sampling, seed=seed)


def _renamed(pairs: Sequence[str]) -> dict[str, str]:
    if not pairs:
        return {}
    from posttrain.quick import renamed  # imports torch, which a ranking alone does without

    return renamed(pairs)


def serve(engine: Engine, *, annotators: Sequence[str], host: str, port: int) -> None:
    """Serve the pages until interrupted; first a link for every annotator that is named is printed.

    Args:
        engine: The database.
        annotators: Who gets a (further) link; where nobody is named and the site is for this machine alone, "me".
        host: The address to listen on.
        port: 0 takes one that is free.

    Raises:
        ConfigError: The site is to be open to other machines, and nobody could sign in.
        OSError: The address cannot be listened on.
    """
    import uvicorn

    from posttrain.annotate.people import anybody, checked_name, new_token
    from posttrain.annotate.web import application

    here = loopback(host)
    names = [checked_name(name) for name in annotators] or ([DEFAULT_ANNOTATOR] if here else [])
    if not names and not anybody(engine):
        raise ConfigError(f"--host {host} opens the page to other machines, and nobody can sign in; give --annotator NAME")
    with _listening(host, port) as listening:
        name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listening.getsockname()[1]}"
        print(f"Ranking at {address}   (Ctrl-C ends; nothing is lost)")
        for name in names:
            print(f"  {name}: {address}/enter#{new_token(engine, name)}")
        if not here:
            print(
                "warning: links and rankings cross the network unencrypted; put a proxy with TLS in front, or use an ssh tunnel",
                file=sys.stderr,
            )
        sys.stdout.flush()
        config = uvicorn.Config(application(engine), log_level="warning", access_log=False, timeout_graceful_shutdown=5)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended in good order and says so again
            uvicorn.Server(config).run(sockets=[listening])


def loopback(host: str) -> bool:
    """Does an address reach this machine alone?

    Example:
        >>> loopback("127.0.0.1"), loopback("localhost"), loopback("::1"), loopback("0.0.0.0")
        (True, True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(256)
    except OSError as cause:
        listening.close()
        raise OSError(f"cannot listen on {host}:{port}: {cause.strerror or cause}; choose another --port or --host") from cause
    return listening


def export(database: str, kind: str, out: Path | None) -> None:
    """Write an export, and say what was written.

    Raises:
        ConfigError: There is no such database or kind, or no file to write.
    """
    from posttrain.annotate.exports import export as write
    from posttrain.annotate.tables import opened

    if out is None:
        raise ConfigError(f"nothing to write to; give --out FILE, for instance --out {kind}.jsonl")
    rows = write(opened(database, create=False), kind, out)
    print(f"{rows} rows in {out}")
    if kind == "pairs":
        print(f"Next: posttrain train bradley_terry --data {out}")
