"""The commands about results: `ray-detox results | publish | table | view | report | export-table`.

None of them imports torch or Ray. `--output` and settings such as `results.store=dynamodb
results.table=my-table` name the store; `publish` takes the settings of the run before those.
"""

import argparse
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_detox import api
from ray_detox.cli.output import path
from ray_detox.errors import ConfigError
from ray_detox.recipes.loading import load_config
from ray_detox.runs.folder import RunFolder
from ray_detox.runs.printable import printable
from ray_detox.store.protocol import ResultStore, check_run_id

if TYPE_CHECKING:
    from ray_detox.config import ResultsConfig

Add = Callable[[str, Any, str], argparse.ArgumentParser]

_SETTINGS = "settings of the store, results.name=value"
_PORT = 8421


def add_verbs(add: Add, add_output: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the commands of this module to the command line."""

    def add_words(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("words", nargs="*", default=(), metavar="SETTING", help=_SETTINGS)

    sub = add("results", _results, "List stored runs, or show one.")
    sub.add_argument("run_id", nargs="?", metavar="RUN", help="id of the run; default: list all")
    add_words(sub)
    sub.add_argument("--json", action="store_true", help="print JSON")
    add_output(sub)
    sub = add("view", _view, "Serve the results as a page for the browser on this machine.")
    sub.add_argument("run_id", nargs="?", metavar="RUN", help="id of the run to open first")
    add_words(sub)
    sub.add_argument(
        "--port", type=int, default=_PORT, metavar="N", help=f"0 takes a free one; default: {_PORT}"
    )
    sub.add_argument(
        "--bind",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; 0.0.0.0 in a container whose port is published; default: 127.0.0.1",
    )
    sub.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="accept a host name by which browsers reach this page; may be repeated",
    )
    sub.add_argument(
        "--no-browser", action="store_true", help="print the address without opening a browser"
    )
    add_output(sub)
    sub = add("report", _report, "Write a run as one HTML file that you can send to somebody.")
    sub.add_argument("run_id", metavar="RUN", help="id of the run")
    add_words(sub)
    sub.add_argument("--html", type=path, metavar="FILE", help="file to write; default: RUN.html")
    add_output(sub)
    sub = add("publish", _publish, "Store a finished run from its folder, again or elsewhere.")
    sub.add_argument("run_id", metavar="RUN", help="id of the run")
    add_words(sub)
    sub.add_argument(
        "--overwrite", action="store_true", help="replace the result that is stored of this run"
    )
    add_output(sub)
    sub = add("table", _table, "Create or check the DynamoDB table for results.")
    sub.add_argument("what", choices=("create", "check"), help="create the table, or check it")
    add_words(sub)
    sub = add(
        "export-table",
        _export_table,
        "Write a stored run into a table with the keys of the published notebook's table.",
    )
    sub.add_argument("run_id", metavar="RUN", help="id of the run")
    sub.add_argument("table", metavar="TABLE", help="name of the DynamoDB table")
    add_words(sub)
    sub.add_argument("--overwrite", action="store_true", help="replace items of other runs")
    add_output(sub)


def _results(args: argparse.Namespace) -> int:
    from ray_detox.runs.console import terminal_width
    from ray_detox.runs.report_text import describe_run, list_line, list_table

    store = _open(args)
    width = terminal_width()
    try:
        if args.run_id is not None:
            report = api.stored_report(store, args.run_id)
            if args.json:
                print(json.dumps(report, indent=2))
            else:
                print(describe_run(report, list(store.get_samples(args.run_id)), width))
            return 0
        runs = api.stored_runs(store)
        if args.json:
            print(json.dumps(runs, indent=2))
        elif not runs:
            print("No run is stored there yet; ray-detox run and ray-detox publish store some.")
        elif width is not None:
            print(list_table(runs, width))
        else:
            print("\n".join(map(list_line, runs)))
        return 0
    finally:
        store.close()


def _view(args: argparse.Namespace) -> int:
    from ray_detox.viewer.server import serve

    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port is {args.port}; expected 0 (any free one) to 65535.")
    for name in args.allow_host:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]", name):
            raise ConfigError(
                f"--allow-host is {name!r}; expected a host name without port, such as host.example."
            )
    store = _open(args, hurried=True)
    try:
        # A wrong table or run is an error of the command here; on the page it would be less clear.
        if args.run_id is not None:
            api.stored_report(store, args.run_id)
        else:
            store.list_page(1)
        serve(
            store,
            args.port,
            open_browser=not args.no_browser,
            say=lambda line: print(line, flush=True),
            run_id=args.run_id,
            host=args.bind.strip("[]") or "0.0.0.0",
            names=args.allow_host,
            folder=args.output if os.access(args.output, os.W_OK | os.X_OK) else None,
        )
        return 0
    finally:
        store.close()


def _report(args: argparse.Namespace) -> int:
    from ray_detox.viewer.standalone import render

    store = _open(args)
    try:
        report = api.stored_report(store, args.run_id)
        page = render(report, list(store.get_samples(args.run_id)), store.get_history(args.run_id))
    finally:
        store.close()
    file = args.html or Path(f"{args.run_id}.html")
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {file} cannot be written: {error.strerror}.") from None
    print(f"Saved to {printable(file)}, {file.stat().st_size / 1e6:.1f} MB; any browser opens it.")
    return 0


def _publish(args: argparse.Namespace) -> int:
    from ray_detox.runs.publish import publish

    folder = RunFolder(args.output, check_run_id(args.run_id))
    results = api.results_settings(folder.read_config(), args.words)
    wrote = publish(results, folder, overwrite=args.overwrite)
    where = printable(_describe(results, folder))
    said = "is stored in" if wrote else "was already, and unchanged, in"
    print(f"Run {args.run_id} {said} {where}.")
    return 0


def _table(args: argparse.Namespace) -> int:
    from ray_detox.store.dynamodb import DynamoDBStore
    from ray_detox.store.notebook import is_notebook_table

    results = api.results_settings(load_config("lab"), args.words)
    name, region, endpoint_url = results.table, results.region, results.endpoint_url
    store = DynamoDBStore(name, region=region, endpoint_url=endpoint_url)
    try:
        if args.what == "create":
            made = store.create_table()
            state = "is ready" if made else "exists already, and can hold results"
            words = [w for w in args.words if not w.startswith("results.store=")]
            words = ["results.store=dynamodb", *words]
            words += (
                []
                if any(w.startswith("results.table=") for w in words)
                else [f"results.table={name}"]
            )
            print(f"Table {printable(name)} {state}; use it with {printable(shlex.join(words))}.")
        elif is_notebook_table(name, region=region, endpoint_url=endpoint_url):
            print(
                f"Table {name} has the published notebook's key: it can hold the samples "
                "of a run, and the whole run is kept in the output folder."
            )
        else:
            store.check()
            print(f"Table {name} can hold results.")
        return 0
    finally:
        store.close()


def _export_table(args: argparse.Namespace) -> int:
    from ray_detox.store import notebook

    store = _open(args)
    results = api.results_settings(load_config("lab"), args.words)
    try:
        api.stored_report(store, args.run_id)
        count = notebook.export(
            store,
            args.run_id,
            args.table,
            region=results.region,
            endpoint_url=results.endpoint_url,
            overwrite=args.overwrite,
        )
    finally:
        store.close()
    print(f"{count} samples of run {args.run_id} are in table {args.table}.")
    return 0


def _open(args: argparse.Namespace, *, hurried: bool = False) -> ResultStore:
    """Open the store that the words of a command name."""
    words = list(args.words)
    if args.run_id and "=" in args.run_id:
        words, args.run_id = [args.run_id, *words], None
    return api.open_results(words, args.output, args.run_id, hurried=hurried)


def _describe(results: "ResultsConfig", folder: RunFolder) -> str:
    if results.store == "sqlite":
        return str(folder.store_path)
    return f"table {results.table}"
