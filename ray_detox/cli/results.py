"""The commands about results: `ray-detox results | publish | table | view | report | export-table`.

None of them needs torch or Ray. Where results are is said by `--output` and by settings such as
`results.store=dynamodb results.table=my-table`, which other commands than `publish` take from
nowhere else.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray_detox.config import ConfigError, ResultsConfig
from ray_detox.recipes.loading import apply_override, config_from_dict, load_config
from ray_detox.runs.folder import RunFolder
from ray_detox.store.errors import StoreError
from ray_detox.store.protocol import ResultStore, check_run_id

Add = Callable[[str, Any, str], argparse.ArgumentParser]

_SETTINGS = "results.name=value"
_PORT = 8421


def add_verbs(add: Add, add_output: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the commands of this module to the command line."""
    sub = add("results", _results, "List stored runs, or show one.")
    sub.add_argument("run_id", nargs="?", metavar="RUN")
    sub.add_argument("words", nargs="*", metavar="SETTING", help=_SETTINGS)
    sub.add_argument("--json", action="store_true", help="print JSON")
    add_output(sub)
    sub = add("view", _view, "Read the results on a page in the browser.")
    sub.add_argument("run_id", nargs="?", metavar="RUN", help="opened first")
    sub.add_argument("words", nargs="*", metavar="SETTING", help=_SETTINGS)
    sub.add_argument("--port", type=int, default=_PORT, metavar="N", help=f"default {_PORT}")
    sub.add_argument("--no-browser", action="store_true", help="only print the address")
    add_output(sub)
    sub = add("report", _report, "Write a run as one HTML file that can be sent to somebody.")
    sub.add_argument("run_id", metavar="RUN")
    sub.add_argument("words", nargs="*", metavar="SETTING", help=_SETTINGS)
    sub.add_argument(
        "--html", type=Path, metavar="FILE", help="the file to write; RUN.html if not given"
    )
    add_output(sub)
    sub = add("publish", _publish, "Store a finished run again from its folder, or elsewhere.")
    sub.add_argument("run_id", metavar="RUN")
    sub.add_argument("words", nargs="*", metavar="SETTING", help=_SETTINGS)
    sub.add_argument("--overwrite", action="store_true", help="replace what is stored of this run")
    add_output(sub)
    sub = add("table", _table, "Create or check the DynamoDB table for results.")
    sub.add_argument("what", choices=("create", "check"))
    sub.add_argument("words", nargs="*", metavar="SETTING", help=_SETTINGS)
    sub = add(
        "export-table",
        _export_table,
        "Write a stored run into a table with the keys of the published notebook's.",
    )
    sub.add_argument("run_id", metavar="RUN")
    sub.add_argument("table", metavar="TABLE")
    sub.add_argument("words", nargs="*", metavar="SETTING", help=_SETTINGS)
    sub.add_argument("--overwrite", action="store_true", help="replace items of other runs")
    add_output(sub)


def _results(args: argparse.Namespace) -> int:
    from ray_detox.runs.report_text import describe_run, list_line

    store = _open(args)
    try:
        if args.run_id is None:
            runs = store.list_runs()
            nothing = "No run is stored there yet; ray-detox run and ray-detox publish store some."
            lines = "\n".join(map(list_line, runs)) or nothing
            print(json.dumps(runs, indent=2) if args.json else lines)
            return 0
        report = _get(store, args.run_id)
        if args.json:
            print(json.dumps(report, indent=2))
        else:
            print(describe_run(report, list(store.get_samples(args.run_id))))
        return 0
    finally:
        store.close()


def _view(args: argparse.Namespace) -> int:
    from ray_detox.viewer.server import serve

    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port is {args.port}; expected 0 (any free one) to 65535.")
    store = _open(args, hurried=True)
    try:
        # Found now and not by a page that cannot say so well: a wrong table, a run that is not there.
        if args.run_id is not None:
            _get(store, args.run_id)
        else:
            store.list_page(1)
        serve(
            store,
            args.port,
            open_browser=not args.no_browser,
            say=lambda line: print(line, flush=True),
            run_id=args.run_id,
        )
        return 0
    finally:
        store.close()


def _report(args: argparse.Namespace) -> int:
    from ray_detox.viewer.standalone import render

    store = _open(args)
    try:
        report = _get(store, args.run_id)
        page = render(report, list(store.get_samples(args.run_id)), store.get_history(args.run_id))
    finally:
        store.close()
    file = args.html or Path(f"{args.run_id}.html")
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {file} cannot be written: {error.strerror}.") from None
    print(f"Saved to {file}, {file.stat().st_size / 1e6:.1f} MB; any browser opens it.")
    return 0


def _publish(args: argparse.Namespace) -> int:
    from ray_detox.runs.publish import publish

    folder = RunFolder(args.output, check_run_id(args.run_id))
    results = _changed(folder.read_config().to_dict(), args.words)
    wrote = publish(results, folder, overwrite=args.overwrite)
    where = _describe(results, folder)
    said = "is stored in" if wrote else "was already, and unchanged, in"
    print(f"Run {args.run_id} {said} {where}.")
    return 0


def _table(args: argparse.Namespace) -> int:
    from ray_detox.store.dynamodb import DynamoDBStore
    from ray_detox.store.notebook import is_notebook_table

    results = _changed(load_config("lab").to_dict(), args.words)
    name, region, endpoint_url = results.table, results.region, results.endpoint_url
    store = DynamoDBStore(name, region=region, endpoint_url=endpoint_url)
    try:
        if args.what == "create":
            store.create_table()
            print(f"Table {name} is ready; use it with results.store=dynamodb.")
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
    results = _changed(load_config("lab").to_dict(), args.words)
    try:
        _get(store, args.run_id)
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
    """The store that the words of a command name."""
    from ray_detox.runs.publish import store_of

    words = list(args.words)
    if args.run_id and "=" in args.run_id:
        words, args.run_id = [args.run_id, *words], None
    results = _changed(load_config("lab").to_dict(), words)
    folder = RunFolder(args.output, args.run_id or "")
    if results.store == "sqlite" and not folder.store_path.is_file():
        raise ConfigError(f"No results in {args.output} yet; ray-detox run makes some.")
    return store_of(results, folder, hurried=hurried)


def _get(store: ResultStore, run_id: str) -> dict[str, Any]:
    report = store.get_run(run_id)
    if report is None:
        raise StoreError(
            f"No result of a run {run_id!r} is stored; `ray-detox results` lists those that are. "
            "A run that was stopped goes on with ray-detox run --resume."
        )
    return report


def _changed(settings: dict[str, Any], words: Sequence[str]) -> ResultsConfig:
    """The section `results` of some settings, changed by words such as `results.table=mine`."""
    for word in words:
        if not word.startswith("results."):
            raise ConfigError(f"{word!r} is no setting of results; expected {_SETTINGS}.")
        apply_override(settings, word)
    return config_from_dict(settings).results


def _describe(results: ResultsConfig, folder: RunFolder) -> str:
    if results.store == "sqlite":
        return str(folder.store_path)
    return f"table {results.table}"
