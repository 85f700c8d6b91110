"""The API of the page: a serverless function over a store of results, which it only reads.

    API Gateway (payload 2.0) --event--> respond(event, store) --> {"statusCode", "headers", "body"}

    /api/runs                          summaries, newest first, in pages
    /api/runs/{run}                    one report
    /api/runs/{run}/history             how training went, step by step
    /api/runs/{run}/samples            samples, sorted and filtered, in pages; or ?index=3,17
    /api/runs/{run}/samples/{index}    one sample in full

`server.py` calls the same `respond` on a laptop. This module needs Python and the store, and
neither torch nor Ray: a function that starts per request has to start at once.
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

from ray_detox.store import (
    BadCursor,
    Page,
    ResultStore,
    SampleQuery,
    StoreError,
    check_run_id,
    open_store,
    to_text,
)
from ray_detox.store.pages import SHOWS, SORTS, as_row

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
"""What every answer to a browser carries; the page's models wrote texts that nobody vouches for."""

API_HEADERS = {
    **SECURITY_HEADERS,
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "content-type": "application/json; charset=utf-8",
    "cache-control": "no-store",
}
"""What an answer of the API carries: it is data, and no document."""

MAX_BODY_BYTES = 4_000_000
"""Lambda refuses answers above 6 MB, and the page should not wait for them."""

MAX_LIMIT, DEFAULT_LIMIT = 100, 50
MAX_SEARCH_CHARACTERS = 200
_CUT_CHARACTERS = 2_000

_ORDERS = ("asc", "desc")
_NUMBER = re.compile("[0-9]{1,8}")  # not \d: that takes the digits of every script

Event = Mapping[str, Any]
Response = dict[str, Any]


class _Refused(Exception):
    """The request cannot be answered; the message is for the person who asked."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def handler(event: Event, context: object) -> Response:
    """Answer one event as an AWS Lambda function.

    The environment gives TABLE, AWS_REGION and ORIGIN_SECRET (optional; see `respond`).
    """
    answer = respond(event, _open_table(), os.environ.get("ORIGIN_SECRET"))
    if event["requestContext"]["http"]["method"] == "HEAD":
        answer["body"] = ""
    return answer


@cache
def _open_table() -> ResultStore:
    """The table, opened once and kept for as long as the container lives."""
    table, region = os.environ["TABLE"], os.environ.get("AWS_REGION")
    return open_store("dynamodb", "", table, region=region, hurried=True)


def respond(event: Event, store: ResultStore, origin_secret: str | None = None) -> Response:
    """Answer an event of API Gateway, payload version 2.0; a HEAD is answered like a GET.

    Args:
        event: `rawPath`, `rawQueryString`, `headers` in lower case, and the method.
        store: where results are read.
        origin_secret: if set, a request must bring it as `x-origin-secret`, which only our own
            CDN knows: nobody then gets around its sign-in and limits.

    Returns:
        Status, headers and JSON text. Errors are `{"error": "one sentence"}`, and say nothing
        of tables, accounts or addresses: that is in the log.
    """
    path = event.get("rawPath", "/")
    try:
        _check_origin(event, origin_secret)
        if event["requestContext"]["http"]["method"] not in ("GET", "HEAD"):
            raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, "Results can only be read: use GET.")
        return _response(HTTPStatus.OK, _route(path, event.get("rawQueryString", ""), store))
    except _Refused as refusal:
        answer = _error(refusal.status, str(refusal))
        if refusal.status is HTTPStatus.METHOD_NOT_ALLOWED:
            answer["headers"]["allow"] = "GET, HEAD"
        return answer
    except BadCursor:
        return _error(
            HTTPStatus.BAD_REQUEST,
            "The cursor is not one of this list; start again from its first page.",
        )
    except StoreError as error:
        log.error("%r could not be read: %s", path, error)
        answer = _error(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "The results cannot be read at the moment; try again in a few seconds.",
        )
        answer["headers"]["retry-after"] = "2"
        return answer
    except Exception:
        # The edge: whatever went wrong inside, its words stay inside.
        log.exception("%r failed", path)
        return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong; it was logged.")


def _check_origin(event: Event, secret: str | None) -> None:
    if not secret:
        return
    given = event.get("headers", {}).get("x-origin-secret", "")
    if not hmac.compare_digest(given.encode(), secret.encode()):
        raise _Refused(HTTPStatus.FORBIDDEN, "This address is not open; use the page's own.")


def _route(path: str, query: str, store: ResultStore) -> str:
    """The JSON text that a path and its query ask for."""
    # Split first: an encoded slash is a character of a name, not a level of the path.
    match [unquote(part) for part in path.split("/")]:
        case ["", "api", "runs"]:
            return _runs(store, _parameters(query, "limit", "cursor"))
        case ["", "api", "runs", run_id]:
            _parameters(query)
            return to_text(_report(store, _run_id(run_id)))
        case ["", "api", "runs", run_id, "history"]:
            _parameters(query)
            return _history(store, _run_id(run_id))
        case ["", "api", "runs", run_id, "samples"]:
            names = ("sort", "order", "show", "q", "limit", "cursor", "index")
            return _samples(store, _run_id(run_id), _parameters(query, *names))
        case ["", "api", "runs", run_id, "samples", index]:
            _parameters(query)
            return _sample(store, _run_id(run_id), index)
    raise _Refused(HTTPStatus.NOT_FOUND, "There is nothing at this address.")


def _runs(store: ResultStore, parameters: dict[str, str]) -> str:
    cursor = parameters.get("cursor")
    return _fit("runs", lambda limit: store.list_page(limit, cursor), _limit(parameters))


def _report(store: ResultStore, run_id: str) -> dict[str, Any]:
    report = store.get_run(run_id)
    if report is None:
        raise _no_run(run_id)
    return report


def _history(store: ResultStore, run_id: str) -> str:
    steps = store.get_history(run_id)
    if not steps:
        _report(store, run_id)
    while _weight(body := to_text({"steps": steps})) > MAX_BODY_BYTES and len(steps) > 1:
        # Every other step, the last one kept: no screen has that many pixels.
        steps = steps[::-2][::-1]
    return body


def _samples(store: ResultStore, run_id: str, parameters: dict[str, str]) -> str:
    if "index" in parameters:
        if len(parameters) > 1:
            raise _bad("index cannot go with other parameters.")
        return _listed(store, run_id, parameters["index"])
    query = SampleQuery(
        sort=_choice(parameters, "sort", SORTS),
        descending=_choice(parameters, "order", _ORDERS) == "desc",
        show=_choice(parameters, "show", SHOWS),
        search=parameters.get("q", ""),
    )
    if len(query.search) > MAX_SEARCH_CHARACTERS:
        raise _bad(f"q has more than {MAX_SEARCH_CHARACTERS} characters; search for less.")
    cursor = parameters.get("cursor")

    def ask(limit: int) -> Page:
        page = store.sample_page(run_id, query, limit, cursor)
        if page is None:
            raise _no_run(run_id)
        return page

    return _fit("samples", ask, _limit(parameters))


def _listed(store: ResultStore, run_id: str, text: str) -> str:
    """Samples by their indices; `next` has the indices for which there was no more room."""
    words = text.split(",")
    if len(words) > MAX_LIMIT or not all(map(_NUMBER.fullmatch, words)):
        raise _bad(f"index must be 1 to {MAX_LIMIT} whole numbers, such as index=3,17,29.")
    _report(store, run_id)
    rows: list[str] = []
    room = MAX_BODY_BYTES
    indices = list(dict.fromkeys(map(int, words)))
    for position, index in enumerate(indices):
        sample = store.get_sample(run_id, index)
        if sample is None:
            continue
        row = to_text(as_row(sample))
        room -= _weight(row)
        if room < 0 and rows:
            return _joined("samples", rows, ",".join(map(str, indices[position:])))
        rows.append(row if room >= 0 else to_text(_cut(as_row(sample))))
    return _joined("samples", rows, None)


def _sample(store: ResultStore, run_id: str, index: str) -> str:
    sample = store.get_sample(run_id, int(index)) if _NUMBER.fullmatch(index) else None
    if sample is None:
        _report(store, run_id)
        raise _Refused(HTTPStatus.NOT_FOUND, f"Run {run_id!r} has no such sample.")
    row = as_row(sample)
    body = to_text(row)
    return body if _weight(body) <= MAX_BODY_BYTES else to_text(_cut(row))


def _fit(name: str, ask: Callable[[int], Page], limit: int) -> str:
    """A page as JSON text, of fewer rows than asked for where they would be too big."""
    while True:
        page = ask(limit)
        rows = [to_text(row) for row in page.rows]
        # How many rows fit. A cursor stands at the end of its page, so that a shorter page has
        # to be asked for; the rows may be others by then.
        room = bisect(list(accumulate(map(_weight, rows))), MAX_BODY_BYTES)
        if room == len(rows):
            return _joined(name, rows, page.next)
        if len(rows) == 1:
            return _joined(name, [to_text(_cut(page.rows[0]))], page.next)
        limit = max(1, room)


def _joined(name: str, rows: Iterable[str], cursor: str | None) -> str:
    return f'{{"{name}":[{",".join(rows)}],"next":{to_text(cursor)}}}'


def _weight(text: str) -> int:
    """Bytes of `text` inside the JSON that Lambda makes of a response: quotes count twice."""
    return len(text.encode()) + text.count('"') + text.count("\\")


def _cut(row: dict[str, Any]) -> dict[str, Any]:
    """A row that fits wherever it goes: long values lose their end, `overflow` has their names."""
    long = [key for key, value in row.items() if len(to_text(value)) > _CUT_CHARACTERS]
    cut = {key: row[key][:_CUT_CHARACTERS] if isinstance(row[key], str) else None for key in long}
    return {**row, **cut, "overflow": sorted({*row.get("overflow", ()), *long})}


def _parameters(query: str, *known: str) -> dict[str, str]:
    """The query's parameters, each of them known and given once."""
    try:
        # From the raw text: API Gateway's own dictionary joins repeated values with commas.
        given = parse_qs(query, keep_blank_values=True, errors="strict", max_num_fields=20)
    except ValueError:
        raise _bad(
            "The query cannot be read; expected name=value, in percent-encoded UTF-8."
        ) from None
    for name, values in given.items():
        if name not in known:
            choices = f"expected {', '.join(known)}" if known else "expected none"
            raise _bad(f"Unknown parameter {name[:40]!r}; {choices}.")
        if len(values) > 1:
            raise _bad(f"{name} is given {len(values)} times; give it once.")
    parameters = {name: value for name, (value,) in given.items()}
    if parameters.get("cursor") == "":
        raise _bad("cursor is empty; leave it out for the first page.")
    return parameters


def _limit(parameters: dict[str, str]) -> int:
    text = parameters.get("limit", str(DEFAULT_LIMIT))
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= MAX_LIMIT:
        raise _bad(f"limit must be a whole number from 1 to {MAX_LIMIT}.")
    return int(text)


def _choice(parameters: dict[str, str], name: str, choices: tuple[str, ...]) -> str:
    """The value of a parameter; its first choice where it is not given."""
    value = parameters.get(name, choices[0])
    if value not in choices:
        raise _bad(f"{name} must be one of {', '.join(choices)}.")
    return value


def _run_id(text: str) -> str:
    try:
        return check_run_id(text)
    except StoreError:
        raise _Refused(HTTPStatus.NOT_FOUND, "There is no such run.") from None


def _no_run(run_id: str) -> _Refused:
    return _Refused(HTTPStatus.NOT_FOUND, f"There is no run {run_id!r}.")


def _bad(sentence: str) -> _Refused:
    return _Refused(HTTPStatus.BAD_REQUEST, sentence)


def _error(status: HTTPStatus, sentence: str) -> Response:
    return _response(status, to_text({"error": sentence}))


def _response(status: HTTPStatus, body: str) -> Response:
    return {
        "statusCode": int(status),
        "headers": dict(API_HEADERS),
        "body": body,
        "isBase64Encoded": False,
    }


# Lambda gives a whole core to the start of a container, and requests a share of one: boto3 is
# better imported now.
if "AWS_LAMBDA_FUNCTION_NAME" in os.environ:
    _open_table()
