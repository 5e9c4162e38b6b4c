"""The pages of a ranking and what they send, as a Starlette application.

Every page needs a token but the one that takes it.  What changes something is a POST from this very site: the cookie is
`SameSite=Strict`, and the request must name its origin.  Templates escape everything, and the content policy allows no
script, style or address but the site's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from sqlalchemy import Engine
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from posttrain.annotate import turns
from posttrain.annotate.figures import figures
from posttrain.annotate.people import Annotator, signed_in
from posttrain.errors import DataError

PAGE = Path(__file__).parent / "page"
COOKIE = "posttrain-rank"
COOKIE_SECONDS = 30 * 24 * 3600
LARGEST = 16_384
"""Bytes of a request's body."""
KEY = re.compile(r"[A-Za-z0-9_-]{8,64}")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Page = Callable[[Request, Annotator], Awaitable[Response]]


def application(engine: Engine) -> Starlette:
    """The site over a database."""
    routes = [
        Route("/", _signed(ranking)),
        Route("/agreement", _signed(agreement)),
        Route("/rank", _signed(rank), methods=["POST"]),
        Route("/undo", _signed(undo), methods=["POST"]),
        Route("/enter", enter, methods=["GET", "POST"]),
        Route("/leave", _signed(leave), methods=["POST"]),
        Mount("/page", StaticFiles(directory=PAGE / "static")),
    ]
    site = Starlette(
        routes=routes, middleware=[Middleware(_Guard)], exception_handlers={HTTPException: _refused, DataError: _refused}
    )
    site.state.engine = engine
    loader = FileSystemLoader(PAGE)
    site.state.templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    site.state.templates.filters["text"] = text_of
    return site


class _Guard(BaseHTTPMiddleware):
    """Headers of every answer, and no change that another site asks for."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        if request.method not in ("GET", "HEAD") and not same_origin(request):
            response: Response = JSONResponse({"error": "this request does not come from this site's own pages"}, 403)
        else:
            response = await call_next(request)
        response.headers.update(HEADERS)
        return response


def same_origin(request: Request) -> bool:
    """Does a request say that it comes from this site?  Browsers always name the origin of a POST."""
    origin = request.headers.get("origin")
    host = request.headers.get("host")
    return origin is not None and host is not None and urlsplit(origin).netloc.lower() == host.lower()


def _signed(page: Page) -> Callable[[Request], Awaitable[Response]]:
    """The page for those who are signed in; others are asked to."""

    async def asked(request: Request) -> Response:
        token = request.cookies.get(COOKIE, "")
        annotator = await run_in_threadpool(signed_in, request.app.state.engine, token) if token else None
        if annotator is not None:
            return await page(request, annotator)
        if request.method == "POST":
            raise HTTPException(401, "you are not signed in; open the link that you were given")
        return RedirectResponse("/enter", 303)

    return asked


async def _refused(request: Request, cause: Exception) -> Response:
    """Errors in words: as JSON to the script, as text to a person."""
    status = cause.status_code if isinstance(cause, HTTPException) else 409 if isinstance(cause, turns.Conflict) else 400
    message = cause.detail if isinstance(cause, HTTPException) else str(cause)
    if request.method == "POST":
        return JSONResponse({"error": message}, status)
    return _rendered(request, "message.html.j2", status=status, title=str(status), message=message)


def _rendered(request: Request, name: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    values = {"annotator": None, "here": request.url.path, **values}
    return HTMLResponse(request.app.state.templates.get_template(name).render(values), status)


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST:
            raise HTTPException(413, f"the request is larger than {LARGEST} bytes")
    return body


async def _sent(request: Request) -> dict[str, Any]:
    """The JSON object that the page sent, with its key."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "expected application/json")
    try:
        found = json.loads(await _body(request))
    except (ValueError, RecursionError):
        raise HTTPException(400, "the request is not JSON") from None
    if not isinstance(found, dict) or not isinstance(found.get("key"), str) or not KEY.fullmatch(found["key"]):
        raise HTTPException(400, "expected an object with a 'key' of 8 to 64 letters, digits, - or _")
    return found


def text_of(message: Mapping[str, Any]) -> str:
    """What a message says; parts that are no text are named."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [str(part.get("text", f"[{part.get('type', 'part')}]")) for part in content if isinstance(part, Mapping)]
        return "\n".join(parts)
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    return json.dumps(rest, ensure_ascii=False, indent=1)


# --------------------------------------------------------------------------------------------------------------
# The pages.


async def ranking(request: Request, annotator: Annotator) -> Response:
    """The annotator's open item, or that all are done."""
    engine = request.app.state.engine
    turn = await run_in_threadpool(turns.next_turn, engine, annotator)
    done = await run_in_threadpool(turns.progress, engine, annotator)
    return _rendered(request, "rank.html.j2", annotator=annotator, turn=turn, progress=done)


async def agreement(request: Request, annotator: Annotator) -> Response:
    """How far the annotators agree, and what each did."""
    engine = request.app.state.engine
    found = await run_in_threadpool(figures, engine)
    done = await run_in_threadpool(turns.progress, engine, annotator)
    return _rendered(request, "agreement.html.j2", annotator=annotator, progress=done, figures=found)


async def rank(request: Request, annotator: Annotator) -> Response:
    """A submission: `item`, `key`, `verdict`, and for an order `places`, one a response in the order of the page."""
    sent = await _sent(request)
    item, verdict, places = sent.get("item"), sent.get("verdict"), sent.get("places")
    if not _whole(item) or verdict not in ("order", "bad", "skip"):
        raise HTTPException(400, "expected the number of an item, and a verdict: order, bad or skip")
    if verdict == "order" and not (isinstance(places, list) and all(_whole(place) for place in places)):
        raise HTTPException(400, "expected 'places', one small whole number a response")
    await run_in_threadpool(
        turns.submit,
        request.app.state.engine,
        annotator,
        item=cast(int, item),
        key=sent["key"],
        verdict=verdict,
        places=places if verdict == "order" else None,
    )
    return JSONResponse({"saved": True})


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


async def undo(request: Request, annotator: Annotator) -> Response:
    """Take the newest ranking back."""
    sent = await _sent(request)
    undone = await run_in_threadpool(turns.undo, request.app.state.engine, annotator, key=sent["key"])
    if undone is None:
        raise HTTPException(404, "there is nothing to undo")
    return JSONResponse({"digest": undone.digest, "verdict": undone.verdict, "places": undone.places})


async def enter(request: Request) -> Response:
    """Where a token is given; the page's script takes it from the link's fragment, which no server sees."""
    if request.method != "POST":
        return _rendered(request, "enter.html.j2", wrong=False)
    token = parse_qs((await _body(request)).decode("utf-8", "replace")).get("token", [""])[0].strip()
    annotator = await run_in_threadpool(signed_in, request.app.state.engine, token)
    if annotator is None:
        return _rendered(request, "enter.html.j2", status=403, wrong=True)
    response = RedirectResponse("/", 303)
    safe = request.url.scheme == "https"
    response.set_cookie(COOKIE, token, max_age=COOKIE_SECONDS, httponly=True, samesite="strict", secure=safe)
    return response


async def leave(_: Request, __: Annotator) -> Response:
    """Forget the token on this machine."""
    response = RedirectResponse("/enter", 303)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response
