"""The playground: a page to try the models with, made of the files in `page/`.

Its scripts come from this server alone, and Trusted Types forbid them to turn text into HTML. So nothing that a model
writes can become code. `marked.js` is marked 18.2.1, unchanged (`marked.LICENSE`).
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# The file behind each path. The paths are known beforehand: a request cannot name any other file.
FILES = {"/": "playground.html"} | {f"/page/{path.name}": path.name for path in FOLDER.glob("*.[cj]s*")}


def routes() -> list[Route]:
    return [Route(path, _file, methods=["GET"]) for path in sorted(FILES)]


async def _file(request: Request) -> Response:
    file = FOLDER / FILES[request.scope["path"]]
    return FileResponse(file, media_type=f"{KINDS[file.suffix]}; charset=utf-8", headers=HEADERS)
