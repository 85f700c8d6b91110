"""The command line: `ray-detox check | run | evaluate | export | schema`.

The other commands are in `jobs.py` (submit) and `results.py` (results, view, report, publish and
tables). A mistake of the user ends with one line and exit code 2 before anything has started.
Commands import what they need when they run, so that `--help` and `results` answer at once.

Exit codes: 0 done, 1 failed while running, 2 a mistake in the command, 129, 130 or 143 stopped.
"""

import argparse
import difflib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_detox import __version__
from ray_detox.cli import jobs as cli_jobs
from ray_detox.cli import results as cli_results
from ray_detox.cli.output import (
    describe_os_error,
    discard_output,
    is_unicode,
    path,
    print_error,
    replace_unencodable,
)
from ray_detox.errors import ConfigError
from ray_detox.machine import built_without, cpu_count, missing_modules, prepare_environment
from ray_detox.recipes.loading import (
    is_setting,
    load_config,
    make_importable,
    recipe_names,
    split_words,
)
from ray_detox.recipes.names import absolute_names
from ray_detox.runs.folder import RunFolder, new_run_id
from ray_detox.runs.printable import counted, printable
from ray_detox.store.errors import StoreError
from ray_detox.store.protocol import check_run_id

if TYPE_CHECKING:
    from ray_detox.config import RunConfig

FAILED, MISTAKE = 1, 2
COMMANDS = (
    "check run submit evaluate results view report publish table export-table schema export".split()
)
RUNNING = ("run", "check", "evaluate", "export")
"""Commands that load models and data."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: the words after `ray-detox`; None takes those of the process.
    """
    replace_unencodable()
    prepare_environment()
    parser = _parser()
    words = sys.argv[1:] if argv is None else list(argv)
    first = words[0] if words else ""
    near = difflib.get_close_matches(first, COMMANDS, n=1)
    if near and first not in COMMANDS:
        parser.error(f"unknown command {first!r}; did you mean {near[0]!r}?")
    args, rest = parser.parse_known_args(argv)
    # Settings may stand before or after options; argparse would refuse the latter.
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        name = unknown[0].lstrip("-")
        if is_setting(name.partition("=")[0]):
            parser.error(f"unknown option {unknown[0]}; a setting has no dashes: {name}")
        parser.error(f"unknown option {unknown[0]}; see ray-detox {args.command} --help")
    if rest and not hasattr(args, "words"):
        parser.error(f"{args.command} takes no {rest[0]!r}")
    if rest:
        args.words = [*args.words, *rest]
    try:
        if args.command in RUNNING and (missing := missing_modules()):
            raise ConfigError(built_without(missing[0]))
        code: int = args.verb(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except (ConfigError, StoreError) as error:
        print_error(error)
        return MISTAKE
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "ray_detox":
            raise
        if package in sys.stdlib_module_names:
            print_error(built_without(package))
            return MISTAKE
        print_error(
            f"{package} is missing in {sys.executable}. Install the package there: "
            "pip install -c constraints.txt ."
        )
        return MISTAKE
    except KeyboardInterrupt as stopped:
        print_error("stopped.")
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
    except BrokenPipeError:
        # The reader of the pipe, such as head, has what it wanted and is gone.
        discard_output()
        return 0
    except OSError as error:
        # Also of the standard output, such as a file on a full disk.
        print_error(describe_os_error(error))
        discard_output()
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ray-detox",
        description="Make an encoder-decoder language model less toxic with PPO, on Ray.",
        epilog="Settings are given as section.name=value, such as ppo.kl_coef=0.1; "
        "`ray-detox check` shows them all.",
    )
    parser.add_argument("--version", action="version", version=f"ray-detox {__version__}")
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, verb: Any, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(verb=verb)
        return sub

    def add_output(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--output",
            type=path,
            default=Path("runs"),
            metavar="DIR",
            help="folder where runs are kept; default: runs",
        )

    def add_accept_changes(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--accept-changes",
            action="store_true",
            help="go on although the data, a model or the package is not the one that the run was "
            "started with; the report shows it",
        )

    def add_trust_functions(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--trust-functions",
            action="store_true",
            help="import the reward functions that the run's settings name although you have not run "
            "them on this machine; they are code",
        )

    def add_checkpoint(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--checkpoint",
            metavar="best|newest|STEP",
            help="take a kept checkpoint instead of the final adapter",
        )

    recipes = f"a recipe ({', '.join(recipe_names())}, or a .yaml file) and section.name=value"
    sub = add("check", _check, "Show all settings of a run and what it needs; starts nothing.")
    sub.add_argument("words", nargs="*", default=(), metavar="RECIPE|SETTING", help=recipes)
    sub.add_argument(
        "--live", action="store_true", help="check the cluster, its nodes and the store instead"
    )
    sub.add_argument(
        "--try-functions",
        action="store_true",
        help="import the reward functions that the recipe names, and try them on a few texts",
    )
    add_output(sub)
    sub = add("run", _run, "Train a policy, measure it and store the result; the main job.")
    sub.add_argument("words", nargs="*", default=(), metavar="RECIPE|SETTING", help=recipes)
    sub.add_argument(
        "--run-id", metavar="ID", help="name of the run; default: recipe, time and a random part"
    )
    sub.add_argument(
        "--resume",
        metavar="RUN",
        help="continue a run from its newest checkpoint; on another machine, pass its "
        "train.storage= as well",
    )
    add_accept_changes(sub)
    add_trust_functions(sub)
    add_output(sub)
    cli_jobs.add_verbs(add)
    sub = add("evaluate", _evaluate, "Measure a run's adapter again, also with changed settings.")
    sub.add_argument("run_id", metavar="RUN", help="id of the run")
    sub.add_argument(
        "words",
        nargs="*",
        default=(),
        metavar="SETTING",
        help="changed settings, section.name=value",
    )
    sub.add_argument("--json", action="store_true", help="print the report as JSON")
    add_checkpoint(sub)
    add_accept_changes(sub)
    add_trust_functions(sub)
    add_output(sub)
    cli_results.add_verbs(add, add_output)
    add("schema", _schema, "Print the JSON schema of a recipe, for editors.")
    sub = add("export", _export, "Merge a run's adapter into its model and save a plain model.")
    sub.add_argument("run_id", metavar="RUN", help="id of the run")
    sub.add_argument(
        "folder", type=path, metavar="FOLDER", help="folder for the model, new or empty"
    )
    add_checkpoint(sub)
    add_output(sub)
    return parser


def _load(words: Sequence[str]) -> "RunConfig":
    """Load the run that words such as `lab train.steps=2` describe.

    Modules with reward functions are found beside the recipe, and in the current folder.
    """
    recipe, settings = split_words(words)
    make_importable(Path.cwd())
    return load_config(recipe, settings)


def _check(args: argparse.Namespace) -> int:
    import yaml

    from ray_detox.resources import needs, table
    from ray_detox.runs.console import terminal_width
    from ray_detox.stages import preflight

    written = _load(args.words)
    config = absolute_names(written)
    if args.live:
        return _check_live(config, args.output, args.try_functions)
    fetched = preflight.check_without_fetching(config, functions=args.try_functions)
    notes = preflight.data_notes(config)
    notes += preflight.reward_notes(config, functions=args.try_functions)
    need = needs(config, cluster_gpus=0)
    settings = written.to_dict()
    # An encoding without all characters gets YAML's escapes: what is shown stays a recipe.
    print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=is_unicode()).rstrip())
    print("---")
    print(table(need.phases, width=terminal_width()))
    workers = config.train.min_workers
    print(
        f"each step: {config.ppo.prompts_per_step} prompts, "
        f"about {config.ppo.prompts_per_step // workers} on each of "
        f"{counted(workers, 'worker')}; {config.ppo.epochs * config.ppo.minibatches} optimiser "
        f"steps of {config.ppo.minibatch_size} sequences"
    )
    print(f"in all: {config.train.steps * config.ppo.prompts_per_step:,} responses")
    for sentence in preflight.generation_notes(config, fetched):
        print(printable(sentence))
    for what in fetched:
        print(f"to be fetched: {printable(what)}")
    for note in notes:
        print(f"note: {printable(note)}")
    return 0


def _check_live(config: "RunConfig", output: Path, try_functions: bool) -> int:
    """Check everything that a run would use, the cluster first, since it is most often at fault."""
    from ray_detox.resources import placement, table
    from ray_detox.runs.console import Console
    from ray_detox.runs.publish import check_store
    from ray_detox.stages import preflight
    from ray_detox.stages.cluster.connect import connected, count_gpus, is_local

    began = time.monotonic()
    console = Console()
    if is_local(config):
        preflight.check_local_gpus(config, count_gpus)
        preflight.check_local_cpus(config, cpu_count())
    with connected(config, console):
        from ray_detox.stages.cluster import admission
        from ray_detox.stages.cluster.nodes import free_nodes
        from ray_detox.stages.cluster.probe import probe_nodes

        need = admission.wait_for_capacity(config, console.line)
        nodes = free_nodes()
        console.line(table(need.phases, nodes, console.width))
        for node, (workers, actors) in zip(nodes, placement(need.phases[0], nodes), strict=True):
            console.line(
                f"node {node.address}: {node.total}, free {node.free}; would take "
                f"{counted(workers, 'worker')} and {counted(actors, 'actor')}"
            )
        grows = admission.has_autoscaler()
        console.line(f"autoscaler: {'yes' if grows else 'no, the nodes are those there are'}")
        preflight.check_output(output)
        preflight.check(config, functions=try_functions)
        console.line("data, models, adapter and storage: looked at from here")
        check_store(config.results, RunFolder(output, "check"), new_run=False)
        console.line(f"results: {config.results.store} can be used")
        for probe in probe_nodes(config, functions=try_functions):
            console.line(
                f"node {probe.address}: models, data, versions and disk looked at, "
                f"{probe.seconds:.1f} s"
            )
    if not try_functions:
        for note in preflight.untried_functions(config):
            console.line(f"note: {note}")
    console.line(f"all is there, {time.monotonic() - began:.1f} s")
    return 0


def _run(args: argparse.Namespace) -> int:
    from ray_detox import api, pipeline
    from ray_detox.runs import trusted
    from ray_detox.runs.console import Console
    from ray_detox.runs.report_text import describe_run
    from ray_detox.runs.resume import resume_from_storage, resumed_settings

    console = Console()
    resume = args.resume is not None
    if resume:
        if args.run_id is not None:
            raise ConfigError("--run-id and --resume exclude each other; --resume names the run.")
        folder = RunFolder(args.output, args.resume)
        make_importable(Path.cwd())

        def require_own(stored: "RunConfig") -> None:
            trusted.require_own(stored, folder.run_id, trust=args.trust_functions, say=console.line)

        storage = [w.partition("=")[2] for w in args.words if w.startswith("train.storage=")]
        if storage and not folder.has_settings():
            resume_from_storage(folder, storage[-1], require_own)
        stored = folder.read_config()
        require_own(stored)
        config = resumed_settings(stored, args.words, folder.run_id)
    else:
        config = absolute_names(_load(args.words))
        run_id = new_run_id(config.recipe) if args.run_id is None else args.run_id
        folder = RunFolder(args.output, run_id)
    go_on = folder.command("run --resume")
    try:
        report = api.train(
            config,
            run_id=folder.run_id,
            output=args.output,
            resume=resume,
            accept_changes=args.accept_changes,
        )
    except pipeline.Stopped as stopped:
        after = f"after step {stopped.step}, with a checkpoint" if stopped.step else "before step 1"
        console.line(f"Stopped {after}. Go on with: {go_on}")
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        if folder.path.is_dir():
            console.line(f"Stopped. Go on with: {go_on}")
        raise
    except pipeline.TrainingDiverged as error:
        print_error(error)
        which = "best" if config.train.probe_prompts else "newest"
        print_error(
            f"its {which} checkpoint before that can be measured with: "
            f"{folder.command('evaluate', '--checkpoint', which)}"
        )
        print_error(
            "another learning rate or KL coefficient needs a new run; with another ppo.max_kl, or "
            f"ppo.stop_on_collapse=false, go on from an earlier step with: {go_on}"
        )
        return FAILED
    except pipeline.LeaseLost as error:
        print_error(error)  # without a command to go on: another process does
        return FAILED
    except (RuntimeError, OSError) as error:
        # TrainingError, RewardError: the message is for the user; the details are in Ray's logs.
        print_error(describe_os_error(error) if isinstance(error, OSError) else error)
        print_error(f"go on from the last checkpoint with: {go_on}")
        return FAILED
    samples = (folder.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    console.line()
    console.line(describe_run(report, [json.loads(line) for line in samples], console.width))
    console.line()
    console.line(f"Everything about it is in {folder.path}; the adapter is {folder.adapter}.")
    console.line(
        f"Again:  {folder.command('results')}    "
        f"Curves:  tensorboard --logdir {shlex.quote(str(args.output))}"
    )
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from ray_detox import api
    from ray_detox.runs.console import terminal_width
    from ray_detox.runs.report_text import describe_run

    progress = sys.stderr if args.json else sys.stdout
    try:
        report = api.evaluate(
            args.run_id,
            args.words,
            args.output,
            checkpoint=args.checkpoint,
            accept_changes=args.accept_changes,
            trust_functions=args.trust_functions,
            stream=progress,
        )
    except RuntimeError as error:
        print_error(error)
        return FAILED
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n" + describe_run(report, width=terminal_width()))
    return 0


def _readable_files(folder: Path) -> None:
    """Give the files of an exported model the ordinary mode, which the umask limits."""
    os.umask(mask := os.umask(0o077))
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


def _schema(args: argparse.Namespace) -> int:
    from ray_detox.recipes.loading import schema

    print(json.dumps(schema(), indent=2))
    return 0


def _export(args: argparse.Namespace) -> int:
    from ray_detox.runs.card import CARD, model_card
    from ray_detox.runs.checkpoint_store import adapter_files, unpack_folder
    from ray_detox.runs.resume import kept_checkpoint

    folder = RunFolder(args.output, check_run_id(args.run_id))
    config = folder.read_config()
    report, steps = None, config.train.steps
    if args.checkpoint is None:
        folder.require_adapter()
        adapter = folder.read_adapter()
        with suppress(ConfigError):  # it has not been measured
            report, _ = folder.read_result()
    else:
        found = kept_checkpoint(config, folder, args.checkpoint)
        adapter, steps = adapter_files(found.files), found.step
    if args.folder.exists() and not args.folder.is_dir():
        raise ConfigError(f"{args.folder} is not a folder. Give a new folder for the model.")
    if args.folder.exists() and any(args.folder.iterdir()):
        raise ConfigError(f"{args.folder} is not empty. Give a new folder for the model.")
    from ray_detox.models.loading import export_model

    unpack_folder(adapter, lambda files: export_model(config.policy, files, args.folder))
    card = model_card(config, folder.run_id, report, steps=steps, merged=True)
    (args.folder / CARD).write_text(card, encoding="utf-8")
    _readable_files(args.folder)  # safetensors writes files that only their owner can read
    print(
        f"Saved to {printable(args.folder)}; it loads with AutoModelForSeq2SeqLM.from_pretrained."
    )
    return 0
