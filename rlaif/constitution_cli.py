"""The commands of `rlaif constitution`; like those of `cli`, each imports what it needs when it runs."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rlaif.errors import ConfigError, ConstitutionError, StageError

constitution_app = typer.Typer(
    help="Check, show, compare, import, test and induce constitution files.", no_args_is_help=True
)
FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="A constitution file, or the name of a shipped one.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="The judge: an embedded name, a folder or a Hub id.", show_default="smollm2-135m"),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(metavar="RECIPE", help="Take models and servers from this recipe, and judge as its `label` says."),
]
JudgeOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Who judges instead: `base`, `ray` or a name in the recipe's `engines`."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _find(path: Path) -> Path:
    from rlaif.documents import find

    return path if path.is_file() else find("constitutions", str(path))


@constitution_app.command("check")
def check(
    paths: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Constitution files.", show_default=False)],
    prompts: Annotated[
        list[str],
        typer.Option(metavar="SET", help="A prompt set that the principles are to serve; may be given several times."),
    ] = ["harmful", "ordinary", "lookalike"],  # noqa: B006
    max_tokens: Annotated[int, typer.Option(min=64, help="The model's context, for estimates of length.")] = 2048,
    as_json: JsonOption = False,
) -> None:
    """Check constitution files: every error and every warning with its file, line and column."""
    from rlaif import constitution_check as checks
    from rlaif.constitution import load
    from rlaif.documents import find

    kinds = checks.read_prompts([find("prompts", name) for name in prompts])
    found = []
    for path in paths:
        file = _find(path)
        problems = checks.check(file, kinds, max_tokens=max_tokens)
        found += problems
        if as_json:
            continue
        for problem in problems:
            typer.echo(f"{problem.place}: {problem.severity}: {problem.message}")
        if not any(problem.severity == "error" for problem in problems):
            whole = load(file)
            counted = f"{len(whole.principles)} principles, {len(whole.examples)} examples, {len(whole.tests)} tests"
            warned = f", {_count(len(problems), 'warning')}" if problems else ""
            typer.echo(f"{path}: {whole.name} {whole.version}: {counted}{warned}")
    found = list(dict.fromkeys(found))
    if as_json:
        typer.echo(checks.as_json(found))
    errors = [problem for problem in found if problem.severity == "error"]
    if errors:
        files = ", ".join(dict.fromkeys(problem.file for problem in errors))
        raise ConstitutionError(f"{_count(len(errors), 'error')} in {files}. Mend what is listed and check again.")


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


@constitution_app.command("show")
def show(
    path: FileArgument,
    principle: Annotated[str | None, typer.Option(help="Only this principle, by its id.", show_default=False)] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Show whole requests, as a model is shown them, about this prompt.")
    ] = None,
    response: Annotated[str, typer.Option(help="The answer to criticize, to revise and to compare.")] = "[a response]",
    critique: Annotated[str, typer.Option(help="What the revision is to mend.")] = "[the critique]",
    other: Annotated[str, typer.Option(help="The second answer of the comparison.")] = "[another response]",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FOLDER", help="Show them through this model's chat template.", show_default=False
        ),
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="How many worked turns; default: as in a recipe that says nothing.")
    ] = None,
) -> None:
    """Show each principle with its wordings or, with a prompt, the whole requests that a model is shown."""
    from rlaif.constitution import load
    from rlaif.recipe import LabelSection, ReviseSection
    from rlaif.requests import plain_turns, requests_of

    if prompt is None and model is not None:
        raise ConfigError("--model: shows whole requests, which need a prompt. Give --prompt TEXT as well.")
    found = load(_find(path))
    chosen = [found.principle(principle)] if principle else found.principles
    if prompt is None:
        for item in chosen:
            typer.echo(f"{item.id}: {item.title}\n  {item.text}")
            typer.echo(f"  critique:   {item.critique_request()}\n  revision:   {item.revision_request()}")
            typer.echo(f"  comparison: {item.comparison_question()}")
            typer.echo(f"  weight {item.weight:g}; for prompts tagged {', '.join(item.applies_to) or 'anything'}\n")
        return
    write = plain_turns
    if model is not None:
        from rlaif.model.base import load_tokenizer

        write = load_tokenizer(model).show
    for item in chosen:
        requests = requests_of(
            found,
            item,
            prompt=prompt,
            response=response,
            critique=critique,
            other=other,
            examples=ReviseSection().few_shot if few_shot is None else few_shot,
            comparisons=LabelSection().few_shot if few_shot is None else few_shot,
        )
        for name, turns in requests.items():
            typer.echo(f"=== {item.id}: {name} ===\n{write(turns)}\n")


@constitution_app.command("diff")
def diff(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="A constitution file, or the name of a shipped one.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Another one.")],
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Also tell what of this run NEW would do again.")
    ] = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 where they differ, for scripts.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell what changed between two constitutions, by id; only what a model can see counts."""
    from rlaif import constitution_diff as differences
    from rlaif.constitution import load

    before, after = load(_find(old)), load(_find(new))
    found = differences.compare(before, after)
    again = None if run is None else differences.redone(run, before, after)
    if as_json:
        typer.echo(json.dumps({**found, "run": again}, indent=2, ensure_ascii=False))
    else:
        typer.echo(differences.as_text(found))
        if again is not None:
            typer.echo(differences.redone_as_text(again))
    if run is not None and not differences.made_with(run, before):
        typer.echo(f"note: {run} was made with other principles or examples than those of {old}.", err=True)
    if exit_code and not found["equal"]:
        raise typer.Exit(1)


@constitution_app.command("import")
def import_(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="A constitution of another project: JSON, text, Markdown.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Where the constitution goes; default: its name, in the working folder.")
    ] = None,
) -> None:
    """Turn a constitution of another project into one of this package; what has no place in it is reported."""
    from rlaif.constitution import load
    from rlaif.constitution_import import import_constitution
    from rlaif.constitution_write import as_yaml
    from rlaif.files import write_text

    imported = import_constitution(path)
    target = output or Path(f"{imported.constitution.name}.yaml")
    if target.exists():
        raise ConfigError(f"{target}: is there already, and may have been edited. Name another file with --output.")
    write_text(target, as_yaml(imported.constitution))
    found = load(target)
    typer.echo(
        f"{path} ({imported.format}): {_count(len(found.principles), 'principle')}, "
        f"{_count(len(found.examples), 'example')} -> {target}"
    )
    for line in imported.left:
        typer.echo(f"  not carried over: {line}")
    typer.echo(f"Now read it, and give: rlaif constitution check {target}")


@constitution_app.command("test")
def test(
    path: FileArgument,
    model: ModelOption = None,
    recipe: RecipeOption = None,
    judge: JudgeOption = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Fail below this share of right verdicts.")] = 0.6,
    journal: Annotated[
        Path | None, typer.Option(help="Keep answers in this file, and ask only for what is not in it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a constitution's tests against a judge; fail below a threshold, for continuous integration."""
    from rlaif.constitution import load

    load(_find(path))  # before torch is imported: mistakes are told at once
    loaded = _judges(model, recipe, judge)
    from rlaif import judging
    from rlaif.progress import Progress

    found = judging.run_tests(_find(path), loaded, Progress(), journal=journal)
    tests = found["tests"]
    found = {**found, "threshold": threshold, "passed": tests["rate"] >= threshold}
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else judging.results_as_text(found))
    if not found["passed"]:
        raise StageError(
            f"{path}: {tests['correct']} of {tests['n']} tests right ({tests['rate']:.0%}); --threshold is "
            f"{threshold:.0%}. Try plainer `comparison` wordings, worked comparisons or a stronger judge."
        )


@constitution_app.command("induce")
def induce(
    path: Annotated[Path, typer.Argument(metavar="COMPARISONS", help="Comparisons of rlaif, hh-rlhf or TRL rows.")],
    output: Annotated[
        Path, typer.Option(help="Where the constitution goes; evidence and answers go beside it.")
    ] = Path("induced.yaml"),
    model: ModelOption = None,
    recipe: RecipeOption = None,
    judge: JudgeOption = None,
    max_propose: Annotated[int, typer.Option(min=1, help="At most so many pairs to propose rules from.")] = 40,
    max_heldout: Annotated[int, typer.Option(min=1, help="At most so many pairs to test each rule on.")] = 60,
    max_candidates: Annotated[int, typer.Option(min=1, help="Test the rules that most pairs propose.")] = 12,
    min_strength: Annotated[float, typer.Option(min=0, help="Logits; a weaker vote takes no side.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the halves and the samples.")] = 0,
    keep_all: Annotated[bool, typer.Option("--keep-all", help="Keep rules that are no better than chance.")] = False,
) -> None:
    """Find principles that reconstruct the labels of comparisons (inverse constitutional AI)."""
    from rlaif.constitution_write import as_yaml
    from rlaif.files import write_json, write_text
    from rlaif.human.labels import read_comparisons

    if output.exists():
        raise ConfigError(f"{output}: is there already, and may have been edited. Name another file with --output.")
    read_comparisons(path)  # before torch is imported: mistakes are told at once
    loaded = _judges(model, recipe, judge)
    from rlaif import induce as induction
    from rlaif import judging
    from rlaif.progress import Progress

    progress = Progress()
    options = induction.Options(
        seed=seed,
        max_propose=max_propose,
        max_heldout=max_heldout,
        max_candidates=max_candidates,
        min_strength=min_strength,
        keep_all=keep_all,
    )
    with judging.open_run(loaded, progress, output.with_suffix(".journal.db")) as run:
        name = run.model_of(loaded.recipe.label.judge)
        found = induction.induce(path, name, judging.engine_of(run), run.journal, progress, options)
    evidence = output.with_suffix(".evidence.json")
    write_json(evidence, found.evidence)
    typer.echo(induction.summary(found.evidence))
    if found.constitution is None:
        raise StageError(
            f"{path}: no rule reconstructs the labels better than chance, so no constitution was written (each rule: "
            f"{evidence}). Take a stronger judge or more comparisons; --keep-all keeps them all the same."
        )
    write_text(output, as_yaml(found.constitution, notes=found.notes))
    typer.echo(f"{_count(len(found.constitution.principles), 'principle')} -> {output}; evidence -> {evidence}")


def _judges(model: str | None, path: Path | None, judge: str | None) -> Any:
    """Return the recipe (a `Loaded`) whose section `label` says who judges: of a model only, or from a file.

    With `judge`, that engine is the only judge.

    Raises:
        ConfigError: the options do not go together, or the recipe has a fault or no such engine.
    """
    from rlaif.endpoints import BASE, RAY
    from rlaif.recipe import load_recipe, only_model

    if path is None:
        if judge is not None:
            raise ConfigError(f"--judge {judge}: names an engine of a recipe. Give the recipe with --recipe as well.")
        return only_model(model or "smollm2-135m")
    if model is not None:
        raise ConfigError(f"--model {model}: the recipe {path} names the model. Give --model or --recipe, not both.")
    loaded = load_recipe(path)
    known = [BASE, RAY, *loaded.recipe.engines]
    if judge is not None and judge not in known:
        raise ConfigError(f"--judge {judge}: no engine `{judge}` in {path}; known: {', '.join(known)}.")
    if judge is not None:
        label = loaded.recipe.label
        label.judge, label.judges = judge, []
        if label.judge_method == "function":
            label.judge_method, label.judge_function = "logprobs", None
    return loaded


@constitution_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of constitution files, for editors."""
    from rlaif.constitution import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
