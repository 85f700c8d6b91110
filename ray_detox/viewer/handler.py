"""The page's read-only API: a serverless function over a store of results.

    API Gateway (payload 2.0) --event--> respond(event, store) --> {"statusCode", "headers", "body"}

    /api/runs                          summaries, newest first, in pages
    /api/runs/{run}                    one report
    /api/runs/{run}/history            metrics of each training step
    /api/runs/{run}/samples            samples, sorted and filtered, in pages; or ?index=3,17
    /api/runs/{run}/samples/{index}    one sample in full

`server.py` calls the same `respond` on this machine. This module imports neither torch nor Ray,
because a serverless function imports it before it can answer its first request.
"""

import hmac
import logging
import os
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from http import HTTPStatus
from itertools import accumulate
from typing import Any
from urllib.parse import parse_qs, unquote

from ray_detox.addresses import redact_tree
from ray_detox.store.errors import BadCursor, StoreError
from ray_detox.store.opening import open_store
from ray_detox.store.pages import SHOWS, SORTS, Page, SampleQuery, as_row
from ray_detox.store.prepare import to_safe_text
from ray_detox.store.protocol import ResultStore, check_run_id

log = logging.getLogger(__name__)

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), display-capture=(), geolocation=(), microphone=(), "
    "payment=(), usb=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "x-robots-tag": "noindex, nofollow",
}
"""Headers of every response. The policy is strict because the page shows untrusted model output."""

API_HEADERS = {
    **SECURITY_HEADERS,
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "content-type": "application/json; charset=utf-8",
    "cache-control": "no-store",
}
"""Headers of an API response, which a browser must treat as data and not as a document."""

MAX_BODY_BYTES = 4_000_000
"""Maximum size of a response body. Lambda rejects responses above 6 MB."""

MAX_LIMIT, DEFAULT_LIMIT = 100, 50
MAX_SEARCH_CHARACTERS = 200
_MAX_VALUE_CHARACTERS = 2_000

_ORDERS = ("asc", "desc")
_NUMBER = re.compile("[0-9]{1,8}")  # not \d, which also matches digits of other scripts

Event = Mapping[str, Any]
Response = dict[str, Any]


class _RequestError(Exception):
    """An invalid request; the client gets the message."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def handler(event: Event, context: object) -> Response:
    """Handle one event as an AWS Lambda function.

    Reads the environment variables TABLE, AWS_REGION and ORIGIN_SECRET (optional; see `respond`).
    """
    response = respond(event, _open_table(), os.environ.get("ORIGIN_SECRET"))
    if event["requestContext"]["http"]["method"] == "HEAD":
        response["body"] = ""
    return response


@cache
def _open_table() -> ResultStore:
    """Open the table once per container."""
    table, region = os.environ["TABLE"], os.environ.get("AWS_REGION")
    return open_store("dynamodb", "", table, region=region, hurried=True)


def respond(event: Event, store: ResultStore, origin_secret: str | None = None) -> Response:
    """Respond to an API Gateway event, payload version 2.0; HEAD gets the same response as GET.

    Args:
        event: `rawPath`, `rawQueryString`, `headers` in lower case, and the method.
        store: the store to read results from.
        origin_secret: if set, the request must carry it as `x-origin-secret`. Only our CDN knows
            it, so clients cannot bypass the CDN's sign-in and rate limits.

    Returns:
        Status, headers and JSON text. Errors are `{"error": "one sentence"}` without names of
        tables, accounts or addresses; those are logged.
    """
    path = event.get("rawPath", "/")
    try:
        _check_origin(event, origin_secret)
        if event["requestContext"]["http"]["method"] not in ("GET", "HEAD"):
            raise _RequestError(HTTPStatus.METHOD_NOT_ALLOWED, "The API is read-only; use GET.")
        return _response(HTTPStatus.OK, _route(path, event.get("rawQueryString", ""), store))
    except _RequestError as error:
        response = _error(error.status, str(error))
        if error.status is HTTPStatus.METHOD_NOT_ALLOWED:
            response["headers"]["allow"] = "GET, HEAD"
        return response
    except BadCursor:
        return _error(
            HTTPStatus.BAD_REQUEST,
            "The cursor does not belong to this list; start again from its first page.",
        )
    except StoreError as error:
        log.error("%r could not be read: %s", path, error)
        response = _error(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "The store of results is unavailable; try again in a few seconds.",
        )
        response["headers"]["retry-after"] = "2"
        return response
    except Exception:
        # Catch everything here, because an unexpected error may name tables or accounts.
        log.exception("%r failed", path)
        return _error(
            HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error; the server's log has the details."
        )


def _check_origin(event: Event, secret: str | None) -> None:
    if not secret:
        return
    given = event.get("headers", {}).get("x-origin-secret", "")
    if not hmac.compare_digest(given.encode(), secret.encode()):
        raise _RequestError(
            HTTPStatus.FORBIDDEN, "Direct access is not allowed; use the address of the page."
        )


def _route(path: str, query: str, store: ResultStore) -> str:
    """The JSON text for a path and its query."""
    # Split before decoding, so that an encoded slash stays part of a name.
    match [unquote(part) for part in path.split("/")]:
        case ["", "api", "runs"]:
            return _runs(store, _parameters(query, "limit", "cursor"))
        case ["", "api", "runs", run_id]:
            _parameters(query)
            return to_safe_text(_report(store, _run_id(run_id)))
        case ["", "api", "runs", run_id, "history"]:
            _parameters(query)
            return _history(store, _run_id(run_id))
        case ["", "api", "runs", run_id, "samples"]:
            names = ("sort", "order", "show", "q", "limit", "cursor", "index")
            return _samples(store, _run_id(run_id), _parameters(query, *names))
        case ["", "api", "runs", run_id, "samples", index]:
            _parameters(query)
            return _sample(store, _run_id(run_id), index)
    raise _RequestError(HTTPStatus.NOT_FOUND, "This path does not exist.")


def _runs(store: ResultStore, parameters: dict[str, str]) -> str:
    cursor = parameters.get("cursor")

    def read_page(limit: int) -> Page:
        page = store.list_page(limit, cursor)
        return Page([redact_tree(row) for row in page.rows], page.next)

    return _page_that_fits("runs", read_page, _limit(parameters))


def _report(store: ResultStore, run_id: str) -> dict[str, Any]:
    report = store.get_run(run_id)
    if report is None:
        raise _run_not_found(run_id)
    redacted: dict[str, Any] = redact_tree(report)
    return redacted


def _history(store: ResultStore, run_id: str) -> str:
    steps = store.get_history(run_id)
    if not steps:
        _report(store, run_id)
    while (
        _encoded_bytes(body := to_safe_text({"steps": steps})) > MAX_BODY_BYTES and len(steps) > 1
    ):
        # Keep every other step and the last one; a chart has fewer pixels than steps.
        steps = steps[::-2][::-1]
    return body


def _samples(store: ResultStore, run_id: str, parameters: dict[str, str]) -> str:
    if "index" in parameters:
        if len(parameters) > 1:
            raise _bad_request("index cannot be combined with other parameters; pass index alone.")
        return _samples_at(store, run_id, parameters["index"])
    query = SampleQuery(
        sort=_choice(parameters, "sort", SORTS),
        descending=_choice(parameters, "order", _ORDERS) == "desc",
        show=_choice(parameters, "show", SHOWS),
        search=parameters.get("q", ""),
    )
    if len(query.search) > MAX_SEARCH_CHARACTERS:
        raise _bad_request(
            f"q has {len(query.search)} characters; expected at most {MAX_SEARCH_CHARACTERS}. "
            "Use a shorter search text."
        )
    cursor = parameters.get("cursor")

    def read_page(limit: int) -> Page:
        page = store.sample_page(run_id, query, limit, cursor)
        if page is None:
            raise _run_not_found(run_id)
        return page

    return _page_that_fits("samples", read_page, _limit(parameters))


def _samples_at(store: ResultStore, run_id: str, text: str) -> str:
    """Samples by their indices; `next` has the indices that did not fit."""
    words = text.split(",")
    if len(words) > MAX_LIMIT or not all(map(_NUMBER.fullmatch, words)):
        raise _bad_request(
            f"index is {text[:40]!r}; expected 1 to {MAX_LIMIT} whole numbers, such as 3,17,29."
        )
    _report(store, run_id)
    rows: list[str] = []
    bytes_left = MAX_BODY_BYTES
    indices = list(dict.fromkeys(map(int, words)))
    for position, index in enumerate(indices):
        sample = store.get_sample(run_id, index)
        if sample is None:
            continue
        row = to_safe_text(as_row(sample))
        bytes_left -= _encoded_bytes(row)
        if bytes_left < 0 and rows:
            return _list_text("samples", rows, ",".join(map(str, indices[position:])))
        rows.append(row if bytes_left >= 0 else to_safe_text(_truncate(as_row(sample))))
    return _list_text("samples", rows, None)


def _sample(store: ResultStore, run_id: str, index: str) -> str:
    sample = store.get_sample(run_id, int(index)) if _NUMBER.fullmatch(index) else None
    if sample is None:
        _report(store, run_id)
        raise _RequestError(HTTPStatus.NOT_FOUND, f"Run {run_id!r} has no sample {index[:20]!r}.")
    row = as_row(sample)
    body = to_safe_text(row)
    return body if _encoded_bytes(body) <= MAX_BODY_BYTES else to_safe_text(_truncate(row))


def _page_that_fits(name: str, read_page: Callable[[int], Page], limit: int) -> str:
    """A page as JSON text, with fewer than `limit` rows if more would exceed `MAX_BODY_BYTES`."""
    while True:
        page = read_page(limit)
        rows = [to_safe_text(row) for row in page.rows]
        # A cursor points to the end of its page, so a shorter page needs its own query; the rows
        # may have changed by then, so check again.
        fitting = bisect(list(accumulate(map(_encoded_bytes, rows))), MAX_BODY_BYTES)
        if fitting == len(rows):
            return _list_text(name, rows, page.next)
        if len(rows) == 1:
            return _list_text(name, [to_safe_text(_truncate(page.rows[0]))], page.next)
        limit = max(1, fitting)


def _list_text(name: str, rows: Iterable[str], cursor: str | None) -> str:
    return f'{{"{name}":[{",".join(rows)}],"next":{to_safe_text(cursor)}}}'


def _encoded_bytes(text: str) -> int:
    """Bytes of `text` in the JSON that Lambda makes of a response, which escapes quotes again."""
    return len(text.encode()) + text.count('"') + text.count("\\")


def _truncate(row: dict[str, Any]) -> dict[str, Any]:
    """Shorten long texts of a row and drop other long values; `overflow` lists their names."""
    long = [key for key, value in row.items() if len(to_safe_text(value)) > _MAX_VALUE_CHARACTERS]
    short = {
        key: row[key][:_MAX_VALUE_CHARACTERS] if isinstance(row[key], str) else None for key in long
    }
    return {**row, **short, "overflow": sorted({*row.get("overflow", ()), *long})}


def _parameters(query: str, *known: str) -> dict[str, str]:
    """Parse the query; every parameter must be known and appear once."""
    try:
        # Parse the raw text, because API Gateway joins repeated values with commas in its own dict.
        given = parse_qs(query, keep_blank_values=True, errors="strict", max_num_fields=20)
    except ValueError:
        raise _bad_request(
            "The query is not valid; expected name=value pairs in percent-encoded UTF-8."
        ) from None
    for name, values in given.items():
        if name not in known:
            choices = f"expected {', '.join(known)}" if known else "expected none"
            raise _bad_request(f"Unknown parameter {name[:40]!r}; {choices}.")
        if len(values) > 1:
            raise _bad_request(f"{name} appears {len(values)} times; pass it once.")
    parameters = {name: value for name, (value,) in given.items()}
    if parameters.get("cursor") == "":
        raise _bad_request("cursor is empty; omit it to get the first page.")
    return parameters


def _limit(parameters: dict[str, str]) -> int:
    text = parameters.get("limit", str(DEFAULT_LIMIT))
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= MAX_LIMIT:
        raise _bad_request(
            f"limit is {text[:40]!r}; expected a whole number from 1 to {MAX_LIMIT}."
        )
    return int(text)


def _choice(parameters: dict[str, str], name: str, choices: tuple[str, ...]) -> str:
    """The value of a parameter; the first choice if the query does not have it."""
    value = parameters.get(name, choices[0])
    if value not in choices:
        raise _bad_request(f"{name} is {value[:40]!r}; expected one of {', '.join(choices)}.")
    return value


def _run_id(text: str) -> str:
    try:
        return check_run_id(text)
    except StoreError:
        raise _run_not_found(text) from None


def _run_not_found(run_id: str) -> _RequestError:
    return _RequestError(HTTPStatus.NOT_FOUND, f"Run {run_id[:80]!r} was not found.")


def _bad_request(message: str) -> _RequestError:
    return _RequestError(HTTPStatus.BAD_REQUEST, message)


def _error(status: HTTPStatus, message: str) -> Response:
    return _response(status, to_safe_text({"error": message}))


def _response(status: HTTPStatus, body: str) -> Response:
    return {
        "statusCode": int(status),
        "headers": dict(API_HEADERS),
        "body": body,
        "isBase64Encoded": False,
    }


# Open the table at import: Lambda gives a full core to a starting container but only a share of
# one to a request, and importing boto3 is slow.
if "AWS_LAMBDA_FUNCTION_NAME" in os.environ:
    _open_table()
