"""A local server for the page: static files, and the API through the same function as on AWS.

    browser --http--> make_server --/api/...------> handler.respond --> store
                                  '-anything else-> a file of static/

The server listens on 127.0.0.1 and accepts only host names of this machine, so that another web
site cannot read results by resolving its own name to this address (DNS rebinding). The port may be
another one, because `ssh -L`, containers and editors forward it. It can listen on another address, as a
container needs, and then accepts that address and the names that the user allows. It requires a
random key, because others can connect as well: the address that it prints has the key, and the
browser keeps it in a cookie.
"""

import hmac
import html
import io
import logging
import re
import secrets
import socket
import socketserver
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from ray_detox.store.errors import StoreError
from ray_detox.store.prepare import to_text
from ray_detox.store.protocol import ResultStore
from ray_detox.viewer.handler import API_HEADERS, SECURITY_HEADERS, respond

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LOOPBACK_HOSTS = (LOOPBACK, "localhost", "[::1]")
EVERY_ADDRESS = ("0.0.0.0", "::", "")

IDLE_S = 60.0
"""Seconds before a connection without a request is closed."""
REQUEST_S = 60.0
"""Seconds from the first byte of a request to the last of its response, however slow the client is."""

STATIC = Path(__file__).with_name("static")
_CONFIG = b'{"auth": null}'
"""Settings of the page: without sign-in, because whoever reads this has the key."""
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
    folder: Path | None = None,
    host: str = LOOPBACK,
    names: Sequence[str] = (),
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        store: the store that has the runs.
        port: port to listen on; 0 takes any free one.
        open_browser: open the page in the default browser, if there is one.
        say: called with each line for the user.
        run_id: the run to open; None opens the list of runs.
        folder: folder for a file that the browser opens; None takes the system's temporary folder.
        host: address to listen on, such as 0.0.0.0 in a container.
        names: further host names by which browsers reach this server.

    Raises:
        StoreError: the server cannot listen on the address or the port.
    """
    with make_server(store, port, host, names=names) as server:
        address = server.address
        if run_id is not None:
            address += f"#/run/{run_id}"
        say(f"Serving results at {address} (press Ctrl-C to stop)")
        if host not in (*LOOPBACK_HOSTS, "::1"):
            say(
                f"It listens on {host}, without encryption: whoever can read the connection can read the "
                "key and the results."
            )
        with _link_file(address, folder) if open_browser else nullcontext() as link:
            if link is not None:
                # On its own thread, because a browser in the terminal blocks until the user quits it.
                threading.Thread(target=_open, args=(link,), daemon=True).start()
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                say("Stopped.")


@contextmanager
def _link_file(address: str, folder: Path | None) -> Iterator[str]:
    """Yield the address of a private file that leads to `address`, as Jupyter makes one.

    All users of this machine can read the arguments with which the browser starts.
    """
    text = html.escape(address)
    page = f'<meta http-equiv="refresh" content="0; url={text}"><a href="{text}">{text}</a>'
    # A browser in a sandbox, such as Ubuntu's Firefox, may read the user's folders and not /tmp.
    with tempfile.TemporaryDirectory(prefix="view-", dir=folder) as private:  # mode 0700
        file = Path(private).absolute() / "open.html"
        file.write_text(page, encoding="utf-8")
        yield file.as_uri()


def make_server(
    store: ResultStore,
    port: int = 0,
    host: str = LOOPBACK,
    static: Path = STATIC,
    names: Sequence[str] = (),
) -> "_Server":
    """Create a listening server; call its `serve_forever` to handle requests.

    Args:
        store: the store that has the runs.
        port: port to listen on; 0 takes any free one.
        host: address to listen on.
        static: folder with the files of the page.
        names: further host names that are accepted, under any port.

    Raises:
        StoreError: the server cannot listen on the address or the port.
    """
    # Only files in this dict can be requested, so no path can escape the folder. Each request reads
    # its file anew.
    files = {
        f"/{file.relative_to(static).as_posix()}": file
        for file in static.rglob("*")
        if file.is_file() and file.suffix in _CONTENT_TYPES
    }
    files["/"] = static / "index.html"
    try:
        kind = _Server6 if ":" in host else _Server
        return kind((host, port), store, files, names)
    except (OSError, OverflowError, UnicodeError) as error:
        what = f"Port {port}" if host == LOOPBACK else f"Port {port} of {host}"
        remedy = "" if host == LOOPBACK else " --bind takes an address of this machine, or 0.0.0.0."
        raise StoreError(
            f"{what} cannot be used: {getattr(error, 'strerror', None) or error}. "
            f"Choose another with `--port`; `--port 0` takes any free one.{remedy}"
        ) from None


def _open(address: str) -> None:
    try:
        webbrowser.open(address)
    except (webbrowser.Error, OSError):
        log.debug("Could not open a browser", exc_info=True)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_port = False  # a second server must fail if the port is taken
    # A page asks for its modules at once, and clients that are slow to speak must not keep others out.
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        store: ResultStore,
        files: Mapping[str, Path],
        names: Sequence[str] = (),
    ) -> None:
        self.store = store
        self.files = files
        super().__init__(address, _Handler)
        port = self.server_port
        bound = f"[{address[0]}]" if ":" in address[0] else address[0]
        here = (*LOOPBACK_HOSTS, *(() if address[0] in EVERY_ADDRESS else (bound,)))
        self.hosts = {name.lower() for name in (*here, *names)}
        self.key = secrets.token_urlsafe(24)
        shown = LOOPBACK if address[0] in EVERY_ADDRESS else bound
        self.address = f"http://{shown}:{port}/?key={self.key}"

    def cookie_for(self, given: str) -> str | None:
        """Return the name of the cookie for a Host header; None if it does not name this server.

        Cookies do not depend on the port, and a second server must not replace the key of this one. The
        port is that of the browser's address, because forwarded servers may all have the same one.
        """
        match = re.fullmatch(
            r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?", given.lower(), re.ASCII
        )
        if match is None or match[1] not in self.hosts:
            return None
        return f"ray-detox-{match[2] or 80}"

    def is_key(self, text: str) -> bool:
        """Compare in constant time."""
        return hmac.compare_digest(text.encode(), self.key.encode())

    def server_bind(self) -> None:
        # Skip HTTPServer.server_bind, which looks up this machine's name and can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Usually the browser closed the connection during a response.
        log.debug("A request failed", exc_info=sys.exc_info())


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Timed(io.RawIOBase):
    """A socket whose reads and writes raise TimeoutError once a request has taken too long."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.deadline: float | None = None
        """On the monotonic clock; None until the first byte of a request."""

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._limit()
        count = self.connection.recv_into(buffer)
        self._begin()
        return count

    def write(self, data: Any) -> int:
        self._begin()  # the request was read together with the one before it
        self._limit()
        return self.connection.send(data)

    def _begin(self) -> None:
        if self.deadline is None:
            self.deadline = time.monotonic() + REQUEST_S

    def _limit(self) -> None:
        left = IDLE_S if self.deadline is None else self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # buffered, so that headers and body are sent in one packet, not 40 ms apart
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(message)s\n"
    server: _Server

    def setup(self) -> None:
        """Let every read and write end with the time of the request."""
        super().setup()
        self.rfile.close()
        self.wfile.close()
        self._timed = _Timed(self.connection)
        self.rfile = io.BufferedReader(self._timed)
        self.wfile = io.BufferedWriter(self._timed)

    def handle_one_request(self) -> None:
        """Handle one request of a connection, each with its own time."""
        self._timed.deadline = None
        super().handle_one_request()

    def _handle(self) -> None:
        self._new_cookie = False
        path, _, query = self.path.partition("?")
        if "content-length" in self.headers or "transfer-encoding" in self.headers:
            # This server reads no bodies; on a kept connection the body would be parsed as a request.
            self.close_connection = True
        hosts = self.headers.get_all("host", [])
        cookie = self.server.cookie_for(hosts[0]) if len(hosts) == 1 else None
        self._cookie = cookie or ""
        if cookie is None:
            address = f"http://127.0.0.1:{self.server.server_port}/"
            self._send_error(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"This host name is not served; open {address} instead, or allow the name with "
                "`ray-detox view --allow-host NAME`.",
            )
        elif not self._has_key(path, query):
            self._send_forbidden(path)
        elif path == "/api" or path.startswith("/api/"):
            self._send_api_response(path, query)
        elif self.command not in ("GET", "HEAD"):
            self._send_error(
                HTTPStatus.METHOD_NOT_ALLOWED, "The page is read-only; use GET.", allow="GET, HEAD"
            )
        elif path == "/config.json":
            self._send(200, {"content-type": _CONTENT_TYPES[".json"]}, _CONFIG)
        else:
            self._send_file(unquote(path))

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _handle

    def _has_key(self, path: str, query: str) -> bool:
        """Return whether the request has the key: as a cookie or, on the page itself, in the query."""
        if path == "/":
            given = parse_qs(query).get("key", [])
            if len(given) == 1 and self.server.is_key(given[0]):
                self._new_cookie = True
                return True
        cookies = "; ".join(self.headers.get_all("cookie", [])).split(";")
        pairs = (cookie.strip().partition("=") for cookie in cookies)
        return any(n.startswith("ray-detox-") and self.server.is_key(v) for n, _, v in pairs)

    def _send_forbidden(self, path: str) -> None:
        message = "This page is private; open the whole address that `ray-detox view` printed, with its key."
        if path.startswith("/api/"):
            self._send(HTTPStatus.FORBIDDEN, API_HEADERS, to_text({"error": message}).encode())
        else:
            self._send_error(HTTPStatus.FORBIDDEN, message)

    def _send_api_response(self, path: str, query: str) -> None:
        event = {
            "version": "2.0",
            "rawPath": path,
            "rawQueryString": query,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "requestContext": {"http": {"method": self.command, "path": path}},
        }
        response = respond(event, self.server.store)
        self._send(response["statusCode"], response["headers"], response["body"].encode())

    def _send_file(self, path: str) -> None:
        file = self.server.files.get(path)
        try:
            body = file.read_bytes() if file else None
        except FileNotFoundError:
            body = None
        if file is None or body is None:
            self._send_error(HTTPStatus.NOT_FOUND, "This path does not exist.")
        else:
            self._send(200, {"content-type": _CONTENT_TYPES[file.suffix]}, body)

    def _send_error(self, status: HTTPStatus, message: str, **headers: str) -> None:
        headers["content-type"] = self.error_content_type
        self._send(status, headers, f"{message}\n".encode())

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        # no-cache: after an upgrade the browser must not run cached modules of the old version.
        for name, value in {**SECURITY_HEADERS, "cache-control": "no-cache", **headers}.items():
            self.send_header(name, value)
        if self._new_cookie:
            # Until the browser ends; not for scripts, and not in requests that other sites make.
            cookie = f"{self._cookie}={self.server.key}; Path=/; HttpOnly; SameSite=Strict"
            self.send_header("set-cookie", cookie)
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
