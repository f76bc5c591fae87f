"""The command line: each command a few lines over the package; nothing heavy is imported until it is needed."""

import errno
import json
import logging
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rlaif.constitution_cli import constitution_app
from rlaif.errors import RlaifError
from rlaif.launch import process_count
from rlaif.reward_cli import RECIPE, reward_app

STAGE_TITLES = {
    "revise": "Write responses, critiques and revisions: the demonstrations.",
    "sft": "Fine-tune the policy adapter on the demonstrations.",
    "label": "Make comparisons: AI judge, construction or people's labels.",
    "reward": "Train the reward adapter on the comparisons.",
    "ppo": "Optimize the policy against the reward.",
    "dpo": "Optimize the policy on the comparisons, without a reward model.",
    "rejection": "Fine-tune the policy on the best of several samples.",
    "evaluate": "Compare the base and all policies on unseen prompts.",
}

INTERRUPTED = 130
_NOISY = ("bitsandbytes.backends.cpu.ops", "transformers.trainer_utils")  # an optional kernel; how files are sorted
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TORCH_WRITER = ("inline_container.cc", "iostream error")  # what torch.save says of a disk

app = typer.Typer(
    help="From a constitution file to an aligned LoRA adapter on one GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
human_app = typer.Typer(help="Labels by people.", no_args_is_help=True)
models_app = typer.Typer(help="The embedded models.", no_args_is_help=True)
app.add_typer(constitution_app, name="constitution")
app.add_typer(human_app, name="human")
app.add_typer(models_app, name="models")
app.add_typer(reward_app, name="reward")

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.", show_default=False)]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as ppo.updates=20.", show_default=False),
]
RoundOption = Annotated[int, typer.Option("--round", min=1, help="In which round, of a recipe with several.")]
RunArgument = Annotated[Path, typer.Argument(help="A run folder, such as runs/quickstart.", show_default=False)]


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = [],  # noqa: B006
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="STAGE", help="Run this stage (of a later round: round-2/ppo) and later ones again."
        ),
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
    plan_: Annotated[bool, typer.Option("--plan", help="Say what would run, and run and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Run a recipe: all stages that are not up to date, then the report."""
    from rlaif.errors import ConfigError
    from rlaif.recipe import load_recipe

    if as_json and not plan_:
        raise ConfigError("--json: is of use with --plan only. Add --plan, or leave it out.")
    loaded = load_recipe(Path(recipe), set_)  # before torch is imported: mistakes are told at once
    if plan_:
        from rlaif import plan

        plans = plan.plan(loaded, first=from_, last=until)
        typer.echo(plan.as_json(plans) if as_json else "\n".join(plan.as_lines(plans)))
        return
    from rlaif.pipeline import run_recipe
    from rlaif.progress import Progress
    from rlaif.report.run import write_report

    progress = Progress()
    folder = run_recipe(loaded, progress, first=from_, last=until)
    progress.say(f"report: {write_report(folder)}")


def _stage_command(stage: str) -> Callable[..., None]:
    def command(recipe: RecipeArgument, set_: SetOption = [], round_: RoundOption = 1) -> None:  # noqa: B006
        from rlaif.recipe import load_recipe
        from rlaif.rounds import Step

        loaded = load_recipe(Path(recipe), set_)
        from rlaif.pipeline import run_recipe
        from rlaif.progress import Progress

        run_recipe(loaded, Progress(), only=str(Step(round_, stage)))

    command.__doc__ = STAGE_TITLES[stage]
    return command


for _stage in STAGE_TITLES:
    if _stage == "reward":
        reward_app.command(RECIPE)(_stage_command(_stage))
    else:
        app.command(_stage)(_stage_command(_stage))


@app.command()
def report(folder: RunArgument) -> None:
    """Write report.html from what a run's stages wrote."""
    from rlaif.report.run import write_report

    typer.echo(str(write_report(folder)))


@app.command()
def trace(
    folder: RunArgument,
    row_id: Annotated[str, typer.Argument(help="The id of a row that a stage wrote.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with whole texts.")] = False,
) -> None:
    """Print where a row came from, back to the sentence of the constitution that caused it."""
    from rlaif import trace as ancestry
    from rlaif import tree

    found = ancestry.trace(folder, row_id)
    if as_json:
        typer.echo(json.dumps(tree.as_json(found), indent=2, ensure_ascii=False))
    else:
        typer.echo("\n".join(tree.as_lines(found)))


@app.command()
def chat(
    folder: RunArgument,
    prompt: Annotated[str | None, typer.Option(help="Ask this once and stop.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.7,
) -> None:
    """Talk to the base model and a run's policy side by side; an empty line or Ctrl+D ends it."""
    from rich.console import Console

    from rlaif.chat import Conversation

    conversation = Conversation(folder, max_new_tokens=max_new_tokens, temperature=temperature)
    console = Console(highlight=False)
    interactive = sys.stdin.isatty()
    while True:
        if prompt is None and interactive:
            console.print("[bold]you:[/bold] ", end="")
        line = prompt if prompt is not None else sys.stdin.readline()
        if not line.strip():
            return
        conversation.show(console, conversation.ask(line.strip()))
        if prompt is not None:
            return


@app.command()
def export(
    engine: Annotated[str, typer.Argument(help="verl or openrlhf.", show_default=False)],
    folder: RunArgument,
    output: Annotated[
        Path | None, typer.Argument(help="Where to write; else export-ENGINE in the run folder.", show_default=False)
    ] = None,
) -> None:
    """Write a run's PPO for verl or OpenRLHF: prompts, reward scorer and settings."""
    from rlaif.export import export as write

    typer.echo(str(write(engine, folder, output) / "run.sh"))


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions and hardware, for a bug report."""
    from rlaif.environment import describe

    found = describe()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for key, value in found.items():
            typer.echo(f"{key:24} {value}")


@human_app.command("import")
def human_import(
    path: Annotated[Path, typer.Argument(help="Preferences, ratings or rankings.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="Where the rows go; else comparisons.jsonl, ratings.jsonl or rankings.jsonl.")
    ] = None,
    annotator: Annotated[str, typer.Option(help="Who labelled rows that do not say.")] = "human",
    tag: Annotated[str, typer.Option(help="Tag of rows that bring none.")] = "",
) -> None:
    """Turn people's labels into rows that can be trained on; unusable ones go to a file beside, with the reason."""
    from rlaif.files import write_jsonl
    from rlaif.human.labels import read_labels, summary

    imported = read_labels(path, annotator=annotator, tag=tag)
    output = output or Path(f"{imported.kind}.jsonl")
    write_jsonl(output, imported.rows)
    unused = output.with_suffix(".unused.jsonl")
    write_jsonl(unused, imported.unused)
    typer.echo(summary(imported, output, unused))


@human_app.command("quality")
def human_quality(
    paths: Annotated[list[Path], typer.Argument(help="Labels that several people gave.", show_default=False)],
    known: Annotated[Path | None, typer.Option(help="Labels of some of the pairs to be taken for the truth.")] = None,
    annotator: Annotated[
        str | None, typer.Option(help="Who labelled rows that do not say; else whom their file is named after.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell how good annotators are, from the pairs that several of them judged, and what their labels should count."""
    from rlaif.errors import DataError
    from rlaif.human.labels import read_labels
    from rlaif.human.quality import measure, summary

    names = {path: annotator or path.name.partition(".")[0] or path.name for path in paths}
    rows = [row for path, name in names.items() for row in read_labels(path, annotator=name).rows]
    found = measure(rows, read_labels(known).rows if known else ())
    if found is None:
        by = sorted({row.annotator for row in rows})
        told = ", ".join(by[:5]) + (", ..." if len(by) > 5 else "")
        raise DataError(
            f"{', '.join(map(str, paths))}: in {len(rows)} labels (by {told}) no pair of answers is judged by two "
            "annotators, so nothing tells who is right how often. Let several people label some of the pairs, or give "
            "known answers to some of them (--known)."
        )
    typer.echo(json.dumps(found.row(), indent=2) if as_json else summary(found))


@models_app.command("list")
def models_list() -> None:
    """List the embedded models."""
    from rlaif.model.builtin import EMBEDDED, converted_folder, is_fetched

    for name, model in EMBEDDED.items():
        where = str(converted_folder(name)) if is_fetched(name) else f"not fetched yet ({model.megabytes} MB)"
        typer.echo(f"{name:16} {model.title}, {model.licence}: {where}")


@models_app.command("fetch")
def models_fetch(name: Annotated[str, typer.Argument(help="An embedded model.")] = "smollm2-135m") -> None:
    """Fetch and convert an embedded model now, so that later runs need no network."""
    from rlaif.model.builtin import fetch

    typer.echo(str(fetch(name, lambda line: typer.echo(line, err=True))))


def main() -> None:
    """Run the command line, in the first of several processes where a launcher started them."""
    if process_count() == 1:
        run_command()
    else:
        from rlaif.stages.processes import lead_or_follow

        lead_or_follow(run_command)


def run_command() -> None:
    """Run the command line: exit 2 for what the user can mend, 130 for an interrupt, 1 for a bug of ours."""
    # Other libraries' notes to their own developers; everything a user should act on is said by this package.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except RlaifError as problem:
        _stop(f"rlaif: {problem}", 2)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:  # typer turns an interrupt into this code without a word
        if end.code == INTERRUPTED:
            _interrupted()
        raise
    except BrokenPipeError:
        sys.exit(1)
    except Exception as problem:  # a full disk shows up as many kinds of error; anything else is a bug of ours
        if not _disk_is_full(problem):
            raise
        _stop(
            f"rlaif: the disk is full ({problem}). Free some space and run again; nothing finished is lost.",
            2,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(*_: object) -> None:
    """Raise the interrupt, and remember it: raised inside a finalizer it would be lost."""
    from rlaif.progress import Task

    Task.interrupted = True
    raise KeyboardInterrupt


def _interrupted() -> None:
    """Say how to continue. Without ``--from``: it has done its work, and said again would begin again."""
    words = [word for word in sys.argv[1:] if not word.startswith("--from=")]
    if "--from" in words:
        place = words.index("--from")
        del words[place : place + 2]
    launcher = "your launcher -m " if process_count() > 1 else ""
    command = launcher + shlex.join(["rlaif", *words])
    _stop(f"\ninterrupted; nothing finished is lost. Continue with: {command}", INTERRUPTED)


def _disk_is_full(problem: BaseException | None) -> bool:
    """Tell whether a full disk is at the root of an error; safetensors and torch report one in words only."""
    if shutil.disk_usage(".").free < 1 << 20:
        return True
    while problem is not None:
        if isinstance(problem, OSError) and problem.errno in _NO_SPACE:
            return True
        if any(words in str(problem) for words in (*_TORCH_WRITER, *(f"(os error {code})" for code in _NO_SPACE))):
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def _stop(message: str, code: int) -> None:
    clean = "".join(char for char in message if char.isprintable() or char in "\n\t")
    print(clean, file=sys.stderr)
    sys.exit(code)
