"""The shape of the package, read from its source: which way imports run, what is banned, how long things are."""

import ast
import functools
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlaif"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "_shipped" not in path.parts)

# A module may import from its own layer and from those named for it; nothing else of the package.
PLAIN = {
    "errors",
    "bag_of_words",
    "counterfactuals",
    "principles",
    "requests",
    "documents",
    "endpoints",
    "overrides",
    "records",
    *("constitution", "constitution_check", "constitution_diff", "constitution_import"),
    *("constitution_length", "constitution_write"),
    "conversations",
    "json_items",
    "markdown",
    "prompting",
    "transcripts",
    "validation",
    "prompt_sets",
    *("recipe", "policy_sections", "ppo_section", "health", "reward_parts", "rounds", "sections"),
    "steering",
    "filters",
    "sameness",
    *("decoders", "files", "journal", "launch", "memory", "progress"),
}
TOP = {"report", "pipeline", "trace", "tree", "plan", "chat", "environment", "induce", "judging", "scoring"}
TOP |= {"reward_server", "reward_service", "export", "export_settings", "verl_reward"}
TOP |= {"memory_advice", "training_costs"}
COMMANDS = {"__main__", "cli", "constitution_cli", "reward_cli"}
ALLOWED = {
    "plain": set(),
    "maths": set(),
    "model": {"plain", "maths"},
    "engines": {"plain", "maths", "model"},
    "human": {"plain", "maths", "model", "engines"},
    "stages": {"plain", "maths", "model", "engines", "human"},
    "top": {"plain", "maths", "model", "engines", "human", "stages"},
    "cli": {"plain", "maths", "model", "engines", "human", "stages", "top"},
    "package": set(),
}
LEARNING = {"torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "safetensors", "datasets"}
WITHOUT_TORCH = ["rlaif.cli", "rlaif.maths.calibration", *(f"rlaif.{name}" for name in sorted(PLAIN))]
WITHOUT_TORCH += ["rlaif.maths.agreement", "rlaif.engines.engine", "rlaif.human.labels", "rlaif.report.run"]

MODULE_LINES = 350
FUNCTION_LINES = 80
LONGER_FUNCTIONS = {("stages/ppo.py", "ppo"): 100}  # the algorithm in reading order
MEDIAN_FUNCTION, P90_FUNCTION = 12, 45

SWITCHES = {
    "set_adapter",
    "enable_adapters",
    "disable_adapters",
    "disable_adapter",
    "enable_adapter_layers",
    "disable_adapter_layers",
}
MERGES = {"merge_adapter", "unmerge_adapter", "merge_and_unload", "add_weighted_adapter"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MODULE_NAMES_BANNED = {"utils", "common", "helpers", "misc", "core"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """Name the layer of a module of the package; a module that stands in none is a mistake in itself."""
    parts = module.split(".")
    if len(parts) == 1:
        return "package"
    first = parts[1]
    for layer, names in (("plain", PLAIN), ("top", TOP), ("cli", COMMANDS)):
        if first in names:
            return layer
    assert first in ALLOWED, f"{module} stands in no layer; put it into one in tests/test_layers.py and DESIGN"
    return first


MODULES = {module_of(path) for path in SOURCES}


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the modules that one import statement names; for `from package import module` that module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in MODULES else str(node.module)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree(path)))


def at_import(path: Path) -> Iterator[ast.AST]:
    """Yield the nodes that run when a module is imported: all but the bodies of functions."""
    todo: list[ast.AST] = [tree(path)]
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo.extend(ast.iter_child_nodes(node))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def functions() -> Iterator[tuple[str, str, int]]:
    for path in SOURCES:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name_of(path), node.name, (node.end_lineno or 0) - node.lineno + 1


def wrong_imports(path: Path) -> list[str]:
    own, wrong = layer_of(module_of(path)), []
    for node in nodes(path):
        for module in imported(node):
            if module.split(".")[0] != "rlaif" or module == "rlaif":
                continue
            layer = layer_of(module)
            if layer != own and layer not in ALLOWED[own]:
                wrong.append(f"{name_of(path)}:{node.lineno}: {own} imports {module}")  # type: ignore[attr-defined]
    return wrong


def test_every_layer_of_the_design_is_there() -> None:
    assert {layer_of(module) for module in MODULES} == set(ALLOWED)
    assert {f"rlaif.{name}" for name in PLAIN | TOP | COMMANDS} <= MODULES


def test_imports_run_one_way() -> None:
    assert [line for path in SOURCES for line in wrong_imports(path)] == []


def test_the_check_of_imports_sees_an_import_the_wrong_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rlaif" / "human" / "page.py"
    path.parent.mkdir(parents=True)
    path.write_text("def f():\n    from rlaif.stages import run\n    import rlaif.cli\n    import rlaif.records\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "rlaif")
    assert wrong_imports(path) == [
        "human/page.py:2: human imports rlaif.stages.run",
        "human/page.py:3: human imports rlaif.cli",
    ]


def test_no_module_imports_itself_by_way_of_others() -> None:
    needs = {
        module_of(path): {name for node in at_import(path) for name in imported(node) if name in MODULES}
        for path in SOURCES
    }
    while needs:
        free = {module for module, wanted in needs.items() if not wanted & needs.keys()}
        assert free, f"these import each other in a circle, or wait for one: {sorted(needs)}"
        needs = {module: wanted for module, wanted in needs.items() if module not in free}


def test_scripts_import_what_is_there() -> None:
    """Benchmarks and studies run seldom, and nothing else would notice that a name has moved."""

    def defined(path: Path) -> set[str]:
        found = set()
        for node in tree(path).body:
            found |= {getattr(node, "name", "")}
            found |= {alias.asname or alias.name for alias in getattr(node, "names", ())}
            targets = [*getattr(node, "targets", ()), getattr(node, "target", None)]
            found |= {name.id for part in targets if part for name in ast.walk(part) if isinstance(name, ast.Name)}
        return found

    paths = {module_of(path): path for path in SOURCES}
    scripts = [
        path
        for path in (ROOT / "scripts").rglob("*")
        if path.is_file()
        and (path.suffix == ".py" or path.suffix == "" and path.read_text("utf-8").startswith("#!/usr/bin/env python"))
    ]
    wrong = [
        f"{path.name}:{node.lineno}: {node.module}.{alias.name}"
        for path in scripts
        for node in nodes(path)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "rlaif"
        for alias in node.names
        if f"{node.module}.{alias.name}" not in MODULES and alias.name not in defined(paths[str(node.module)])
    ]
    assert wrong == []
    assert len(scripts) > 10


def test_the_plain_layer_names_no_learning_library_at_all() -> None:
    found = [
        f"{name_of(path)}: {module}"
        for path in SOURCES
        if layer_of(module_of(path)) in ("plain", "human", "package")
        for node in nodes(path)
        for module in imported(node)
        if module.split(".")[0] in LEARNING
    ]
    assert found == []


def test_the_maths_needs_torch_and_numbers_only() -> None:
    known = {"rlaif", "torch", "numpy", "scipy", *sys.stdlib_module_names}
    found = {
        module.split(".")[0]
        for path in SOURCES
        if layer_of(module_of(path)) == "maths"
        for node in nodes(path)
        for module in imported(node)
    }
    assert found <= known


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_modules_that_need_no_model_load_without_torch() -> None:
    code = f"import importlib, sys\nfor name in {WITHOUT_TORCH}: importlib.import_module(name)\n"
    done = run_python(code + f"print(sorted(sys.modules.keys() & {LEARNING}))")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_command_line_imports_only_errors_until_a_command_runs() -> None:
    def names(module: str) -> set[str]:
        found = {name for node in at_import(PACKAGE / f"{module}.py") for name in imported(node)}
        return {name for name in found if name.startswith("rlaif")}

    assert names("cli") == {"rlaif.errors", "rlaif.launch", "rlaif.constitution_cli", "rlaif.reward_cli"}
    assert names("constitution_cli") == {"rlaif.errors"}


def test_no_module_is_longer_than_350_lines() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > MODULE_LINES} == {}


def test_no_function_is_longer_than_80_lines_but_the_one_that_is_the_algorithm() -> None:
    long = {(file, name): lines for file, name, lines in functions() if lines > FUNCTION_LINES}
    assert {key: lines for key, lines in long.items() if lines > LONGER_FUNCTIONS.get(key, FUNCTION_LINES)} == {}


def test_functions_are_short_on_the_whole() -> None:
    lengths = [lines for _, _, lines in functions()]
    assert statistics.median(lengths) <= MEDIAN_FUNCTION
    assert statistics.quantiles(lengths, n=10)[-1] <= P90_FUNCTION


def test_only_prompting_builds_a_jinja_environment() -> None:
    """Others may catch Jinja's errors, and nothing more."""
    found = [
        f"{name_of(path)}: {alias.name}"
        for path in SOURCES
        if name_of(path) != "prompting.py"
        for node in nodes(path)
        if (isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "jinja2")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "jinja2" for alias in node.names))
        for alias in node.names
        if not alias.name.endswith("Error")
    ]
    assert found == []


def uses(names: set[str]) -> set[str]:
    """Return the files that call or name an attribute, function or string of one of these names."""
    return {
        name_of(path)
        for path in SOURCES
        for node in nodes(path)
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.Name) and node.id in names)
        or (isinstance(node, ast.alias) and node.name.split(".")[-1] in names)
        or (isinstance(node, ast.Constant) and node.value in names)
    }


def test_only_roles_switches_adapters() -> None:
    flag = {"disable_adapters"}  # of a layer it is a flag, which is read
    assert uses(SWITCHES - flag) == {"model/roles.py"}
    assert uses(flag) == {"model/lora.py", "model/roles.py"}


def test_no_adapter_is_merged() -> None:
    assert uses(MERGES) == set()


def test_nothing_is_pickled() -> None:
    found = []
    for path in SOURCES:
        for node in nodes(path):
            names = [name for name in imported(node) if name.split(".")[0] in PICKLES]
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and (node.value.id, node.attr) in {("torch", "load"), ("torch", "save")}
            ):
                names.append(f"torch.{node.attr}")
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                names += [f"torch.{alias.name}" for alias in node.names if alias.name in ("load", "save")]
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                names.append("allow_pickle")
            found += [f"{name_of(path)}:{getattr(node, 'lineno', '')}: {name}" for name in names]
    assert found == []


def test_no_code_of_a_model_is_trusted() -> None:
    values = [
        (name_of(path), ast.unparse(value))
        for path in SOURCES
        for node in nodes(path)
        for key, value in (
            zip(node.keys, node.values, strict=True)
            if isinstance(node, ast.Dict)
            else [(ast.Constant(node.arg), node.value)]
            if isinstance(node, ast.keyword)
            else []
        )
        if isinstance(key, ast.Constant) and key.value == "trust_remote_code"
    ]
    assert values and {value for _, value in values} == {"False"}


def test_nothing_is_imported_from_the_experimental_part_of_trl() -> None:
    names = {name for path in SOURCES for node in nodes(path) for name in imported(node)}
    assert [name for name in names if name.startswith("trl.experimental")] == []


def test_errors_of_unknown_kind_are_caught_in_one_place() -> None:
    """`cli.main` looks whether a full disk is at the root of one, and raises it again where not."""
    found = {
        f"{name_of(path)}: {ast.unparse(node.type) if node.type else 'everything'}"
        for path in SOURCES
        for node in nodes(path)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and not any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
    }
    assert found == set()


def test_modules_are_named_for_what_they_hold() -> None:
    names = {part for module in MODULES for part in module.split(".")}
    assert names & MODULE_NAMES_BANNED == set()
