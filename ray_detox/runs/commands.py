"""Commands that messages tell the user to run: they work as printed, in the current folder."""

import shlex
from pathlib import Path

DEFAULT_OUTPUT = Path("runs")


def command(verb: str, output: Path, run_id: str, *options: str) -> str:
    """Return a command about a run, such as `ray-detox run --resume first --output ~/runs`."""
    where = "" if output == DEFAULT_OUTPUT else f" --output {shlex.quote(str(output))}"
    return f"ray-detox {verb} {shlex.join((run_id, *options))}{where}"
