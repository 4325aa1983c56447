"""The page at `/`: its files, and what a browser may do with them.

Answers of a model are hostile text: the policy below lets the page run its own scripts only, send requests to
this server only, and turn no string into markup.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from longscan.models import MODELS
from longscan.serve.errors import ApiError

__all__ = ["PAGE", "add_page_routes"]

PAGE = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # ask each time whether it has changed: an update shows at once
}


def add_page_routes(app: FastAPI) -> None:
    """Add the page.

    Args:
        app: that serves it.
    """

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return _file(request, "index.html")

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request, name: str) -> Response:
        return _file(request, name)

    @app.get("/line", include_in_schema=False)
    def line() -> Any:
        """Return the line of models, oldest first."""
        fields = ("name", "kind", "year", "paper", "arxiv", "idea", "parents", "verbs")
        return [{field: getattr(entry, field) for field in fields} for entry in MODELS.values()]


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Return content and ETag of all files by name."""
    found = {}
    for path in PAGE.iterdir():
        if path.suffix in TYPES:
            content = path.read_bytes()
            found[path.name] = content, f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    return found


def _file(request: Request, name: str) -> Response:
    """Return a file of the page, or that the browser has it already."""
    if name not in _files():
        raise ApiError(404, "the page has no such file.", "unknown_url")
    content, tag = _files()[name]
    headers = {**HEADERS, "ETag": tag}
    known = request.headers.get("if-none-match", "")
    if tag in (each.strip().removeprefix("W/") for each in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=TYPES[Path(name).suffix], headers=headers)
