"""The page on this machine: static files, and the API by the very function that serves it on AWS.

    browser --http--> make_server --/api/...------> handler.respond --> store
                                  '-anything else-> a file of static/

It listens on 127.0.0.1 and answers only to names of this machine, so that a page elsewhere
cannot read results by pointing a name of its own here (DNS rebinding).
"""

import logging
import socketserver
import sys
import threading
import webbrowser
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ray_detox.store.errors import StoreError
from ray_detox.store.protocol import ResultStore
from ray_detox.viewer.handler import SECURITY_HEADERS, respond

log = logging.getLogger(__name__)

STATIC = Path(__file__).with_name("static")
_CONFIG = b'{"auth": null}'
"""The page's settings: nobody signs in on their own machine."""
_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}


def serve(
    store: ResultStore,
    port: int,
    open_browser: bool,
    say: Callable[[str], None],
    run_id: str | None = None,
) -> None:
    """Show the page until Ctrl-C.

    Args:
        store: whose runs to show.
        port: where to listen; 0 takes any free one.
        open_browser: open the page in the browser, if there is one.
        say: takes a line for the person.
        run_id: the run to show first; None shows the list.

    Raises:
        StoreError: the port cannot be used.
    """
    with make_server(store, port) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        if run_id is not None:
            address += f"#/run/{run_id}"
        say(f"Results are at {address} (stop with Ctrl-C)")
        if open_browser:
            # On a thread of its own: a browser of the terminal ends when its person has read.
            threading.Thread(target=_open, args=(address,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("Stopped.")


def make_server(
    store: ResultStore, port: int = 0, host: str = "127.0.0.1", static: Path = STATIC
) -> ThreadingHTTPServer:
    """A server that listens, and answers once it is told to `serve_forever`.

    Raises:
        StoreError: the port cannot be used.
    """
    # What is not in this list has no address, whatever a path looks like; a file's text is read
    # when it is asked for.
    files = {
        f"/{file.relative_to(static).as_posix()}": file
        for file in static.rglob("*")
        if file.is_file() and file.suffix in _CONTENT_TYPES
    }
    files["/"] = static / "index.html"
    try:
        return _Server((host, port), store, files)
    except (OSError, OverflowError) as error:
        raise StoreError(
            f"Port {port} cannot be used: {getattr(error, 'strerror', None) or error}. "
            "Choose another with --port; --port 0 takes any free one."
        ) from None


def _open(address: str) -> None:
    try:
        webbrowser.open(address)
    except (webbrowser.Error, OSError):
        log.debug("no browser could be opened", exc_info=True)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_port = False  # a second server is told that the port is taken

    def __init__(
        self, address: tuple[str, int], store: ResultStore, files: Mapping[str, Path]
    ) -> None:
        self.store = store
        self.files = files
        super().__init__(address, _Handler)
        port = self.server_port
        names = ("127.0.0.1", "localhost", "[::1]")
        self.hosts = {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())

    def server_bind(self) -> None:
        # Not HTTPServer's: that asks DNS for the name of this machine, which can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Most often a browser that went away in the middle of an answer.
        log.debug("a request failed", exc_info=sys.exc_info())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # buffered: headers and body leave in one packet, not 40 ms apart
    timeout = 60  # seconds that an idle connection is kept
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(message)s\n"
    server: _Server

    def _answer(self) -> None:
        path, _, query = self.path.partition("?")
        if "content-length" in self.headers or "transfer-encoding" in self.headers:
            # A body that nobody reads would be taken for the next request.
            self.close_connection = True
        hosts = self.headers.get_all("host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            address = f"http://127.0.0.1:{self.server.server_port}/"
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, f"This is not {address}; use that.")
        elif path == "/api" or path.startswith("/api/"):
            self._answer_api(path, query)
        elif self.command not in ("GET", "HEAD"):
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "Use GET.", allow="GET, HEAD")
        elif path == "/config.json":
            self._send(200, {"content-type": _CONTENT_TYPES[".json"]}, _CONFIG)
        else:
            self._answer_file(unquote(path))

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _answer

    def _answer_api(self, path: str, query: str) -> None:
        event = {
            "version": "2.0",
            "rawPath": path,
            "rawQueryString": query,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "requestContext": {"http": {"method": self.command, "path": path}},
        }
        answer = respond(event, self.server.store)
        self._send(answer["statusCode"], answer["headers"], answer["body"].encode())

    def _answer_file(self, path: str) -> None:
        file = self.server.files.get(path)
        try:
            body = file.read_bytes() if file else None
        except FileNotFoundError:
            body = None
        if file is None or body is None:
            self._refuse(HTTPStatus.NOT_FOUND, "There is nothing at this address.")
        else:
            self._send(200, {"content-type": _CONTENT_TYPES[file.suffix]}, body)

    def _refuse(self, status: HTTPStatus, sentence: str, **headers: str) -> None:
        headers["content-type"] = self.error_content_type
        self._send(status, headers, f"{sentence}\n".encode())

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        # no-cache: after an upgrade the page must not run with yesterday's modules.
        for name, value in {**SECURITY_HEADERS, "cache-control": "no-cache", **headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        if self.close_connection:
            self.send_header("connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "ray-detox"

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
