"""A proxy for a DynamoDB emulator that injects network faults, which no emulator offers."""

import http.client
import json
import threading
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ERRORS = {
    "throttle": (400, "com.amazonaws.dynamodb.v20120810#ProvisionedThroughputExceededException"),
    "broken": (500, "com.amazonaws.dynamodb.v20120810#InternalServerError"),
    "denied": (400, "com.amazon.coral.service#AccessDeniedException"),
    "expired": (400, "com.amazon.coral.service#ExpiredTokenException"),
}
FOR_EVER = 10**9


class FaultProxy:
    """Forwards requests to `upstream`; `fail` injects faults into the next calls of an operation."""

    def __init__(self, upstream):
        self.upstream = urlsplit(upstream).netloc
        self.calls = Counter()
        self._faults = []
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def fail(self, operation, kind, times=1, after=0):
        """Make `times` calls of an operation fail, after `after` calls that succeed.

        Kinds: those of `ERRORS`; `reset` (before the request is applied), `lost` (applied, but the
        answer is lost), `hang` (until the proxy is closed); for BatchWriteItem also `half` and
        `none` (half or none of the items are written) and `swallow` (none are written, but the
        answer reports success).
        """
        self._faults.append({"of": operation, "kind": kind, "times": times, "after": after})

    def next_fault(self, operation):
        with self._lock:
            self.calls[operation] += 1
            for fault in self._faults:
                if fault["of"] == operation and fault["times"] > 0:
                    if fault["after"] > 0:
                        fault["after"] -= 1
                        return None
                    fault["times"] -= 1
                    return fault["kind"]
        return None

    def heal(self):
        """Remove all faults."""
        self._faults.clear()

    def close(self):
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # buffered: unbuffered answers take 40 ms each

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            operation = self.headers["x-amz-target"].rpartition(".")[2]
            kind = proxy.next_fault(operation)
            if kind in ERRORS:
                status, name = ERRORS[kind]
                self.answer(status, json.dumps({"__type": name, "message": "secret"}).encode())
            elif kind == "reset":
                self.hang_up()
            elif kind == "hang":
                proxy._closed.wait(60)
                self.hang_up()
            elif kind == "swallow":
                self.answer(200, b'{"UnprocessedItems": {}}')
            elif kind in ("half", "none"):
                ((table, requests),) = json.loads(body)["RequestItems"].items()
                kept = 0 if kind == "none" else len(requests) // 2
                if kept:
                    self.forward(json.dumps({"RequestItems": {table: requests[:kept]}}).encode())
                left = {"UnprocessedItems": {table: requests[kept:]}}
                self.answer(200, json.dumps(left).encode())
            else:
                status, data = self.forward(body)
                if kind == "lost":
                    self.hang_up()
                else:
                    self.answer(status, data)

        def forward(self, body):
            connection = http.client.HTTPConnection(proxy.upstream, timeout=60)
            drop = ("host", "content-length", "connection", "accept-encoding")
            headers = {k: v for k, v in self.headers.items() if k.lower() not in drop}
            connection.request("POST", self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            return answer.status, data

        def answer(self, status, data):
            self.send_response(status)
            self.send_header("content-type", "application/x-amz-json-1.0")
            self.send_header("content-length", str(len(data)))
            self.send_header("x-amz-crc32", str(zlib.crc32(data)))
            self.end_headers()
            self.wfile.write(data)

        def hang_up(self):
            self.close_connection = True
            self.connection.shutdown(2)

        def log_message(self, *_):
            pass

    return Handler
