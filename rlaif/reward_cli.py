"""The commands ``rlaif reward``: the stage of a recipe, and the use of what it has trained."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlaif.errors import ConfigError

RECIPE = "RECIPE"  # stands in the list of commands for any recipe


class RewardGroup(TyperGroup):
    """Commands of which one has no name: a first word that is none of the others is a recipe."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the stage's command before a recipe or its options."""
        named = not args or args[0] in self.commands or args[0] == "--help"
        return super().parse_args(ctx, args if named else [RECIPE, *args])


reward_app = typer.Typer(
    cls=RewardGroup, help="Train the reward adapter of a recipe, or score with a trained one.", no_args_is_help=True
)

ModelOption = Annotated[
    Path, typer.Option("--model", help="A run folder, its 4-reward, or an adapter folder.", show_default=False)
]
EnsembleOption = Annotated[
    str | None,
    typer.Option(help="How members become one score: mean, worst or uncertainty.", show_default=False),
]
RawOption = Annotated[bool, typer.Option("--raw", help="Scores as the heads give them, neither shifted nor scaled.")]
BatchOption = Annotated[int, typer.Option(min=1, max=4096, help="Rows in a forward pass.")]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="The base to put an adapter folder on, if not its own.", show_default=False)
]


@reward_app.command()
def score(
    file: Annotated[Path, typer.Argument(help="Conversations or comparisons, JSON lines.", show_default=False)],
    model: ModelOption,
    output: Annotated[Path | None, typer.Option(help="Where the rows go; else printed.", show_default=False)] = None,
    ensemble: EnsembleOption = None,
    raw: RawOption = False,
    batch_size: BatchOption = 16,
    base: BaseOption = None,
) -> None:
    """Score the answers in a file; each row comes back with its score."""
    _check_ensemble(ensemble)
    from rlaif.conversations import read_answers

    rows = read_answers(file)  # before torch is imported: mistakes are told at once
    from rlaif.files import write_jsonl
    from rlaif.progress import Progress
    from rlaif.records import jsonl
    from rlaif.scoring import Scorer, score_rows, summary

    progress = Progress()
    scorer = Scorer.load(model, ensemble=ensemble, raw=raw, batch_size=batch_size, base=base)
    found = score_rows(scorer, file, rows, progress)
    if output is None:
        sys.stdout.write(jsonl(found))
    else:
        write_jsonl(output, found)
    progress.say(summary(found) + (f" -> {output}" if output else ""))


@reward_app.command()
def serve(
    model: ModelOption,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free one.")] = 5000,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="Name of the environment variable with the key to ask for.", show_default=False),
    ] = None,
    allow_host: Annotated[
        list[str], typer.Option(help="A further name by which clients call this machine.", show_default=False)
    ] = [],  # noqa: B006
    ensemble: EnsembleOption = None,
    raw: RawOption = False,
    batch_size: BatchOption = 16,
    base: BaseOption = None,
) -> None:
    """Serve scores over HTTP, in the formats of OpenRLHF and verl; Ctrl+C ends it."""
    _check_ensemble(ensemble)
    key = _key(api_key_env)
    from rlaif.progress import Progress
    from rlaif.reward_server import Server
    from rlaif.reward_service import Service
    from rlaif.scoring import Scorer

    progress = Progress()
    scorer = Scorer.load(model, ensemble=ensemble, raw=raw, batch_size=batch_size, base=base)
    service = Service(scorer, name=str(model), key=key, hosts=allow_host)
    try:
        server = Server((host, port), service, progress.say)
    except OSError as problem:
        raise ConfigError(f"--host {host} --port {port}: cannot be listened at: {problem}. Choose others.") from None
    address = f"http://[{host}]" if ":" in host else f"http://{host}"
    progress.say(f"serving {model} at {address}:{server.server_port}/get_reward; Ctrl+C ends it")
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        progress.say(f"  warning: whoever reaches {host} can ask; --api-key-env asks for a key")
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        server.run()
    except KeyboardInterrupt:
        progress.say("stopped")


def _check_ensemble(name: str | None) -> None:
    if name not in (None, "mean", "worst", "uncertainty"):
        raise ConfigError(f"--ensemble: `{name}` is not known. Expected one of: mean, worst, uncertainty.")


def _key(name: str | None) -> str | None:
    """Return the key that the environment holds under a name; its value is never shown."""
    if name is None:
        return None
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ConfigError(
            "--api-key-env: the name of an environment variable in capital letters is expected, such as REWARD_KEY, "
            "and never the key itself."
        )
    value = os.environ.get(name, "").strip()
    if not re.fullmatch(r"[!-~]+", value):
        raise ConfigError(
            f"--api-key-env: the environment variable `{name}` is not set, or holds what no key has. Set it to the key."
        )
    return value
