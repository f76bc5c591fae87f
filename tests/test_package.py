"""The wheel: built from this checkout, installed into an environment of its own, used from an empty folder."""

import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {
    "constitutions": "*.yaml *.json",
    "prompts": "*.jinja *.jsonl *.md",
    "recipes": "*.yaml *.jsonl",
}

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel; without hatchling in this environment pip fetches it, as it does for every user."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", ROOT, "--no-deps", *isolation, "--wheel-dir", folder, cwd=folder)
    (found,) = folder.glob("rlaif_toolkit-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into a new environment, which borrows its dependencies from this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # A path that a .pth file adds comes after the environment's own, and its .pth files are not read.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin"


def test_the_wheel_holds_every_module_and_every_shipped_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind, patterns in SHIPPED.items():
        files = [path for pattern in patterns.split() for path in (ROOT / kind).glob(pattern)]
        assert files and {f"rlaif/_shipped/{kind}/{path.name}" for path in files} <= names
    package = [path for path in (ROOT / "rlaif").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.relative_to(ROOT).as_posix() for path in package} <= names


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rlaif"}
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "__pycache__" in name]


def test_the_installed_copy_is_the_one_that_runs_and_finds_what_it_ships(installed: Path, tmp_path: Path) -> None:
    code = "import rlaif; from rlaif.documents import shipped; print(rlaif.__file__); print(shipped('recipes'))"
    module, recipes = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert Path(module).is_relative_to(installed.parent)
    assert Path(recipes) == Path(module).parent / "_shipped" / "recipes"


def test_the_installed_command_reads_its_own_constitutions_recipes_and_prompts(installed: Path, tmp_path: Path) -> None:
    shown = run(installed / "rlaif", "constitution", "check", "harmless", "helpful-honest", cwd=tmp_path)
    assert [line.split(":")[0] for line in shown.splitlines()] == ["harmless", "helpful-honest"]
    code = (
        "from pathlib import Path\n"
        "from rlaif.recipe import load_recipe\n"
        "from rlaif.prompting import load_template\n"
        "from rlaif.stages.rewards import find_function\n"
        "found = load_recipe(Path('human'))\n"
        "paths = [found.path, found.constitution, *found.prompts, *found.human_files, load_template('compare').path]\n"
        "assert all('_shipped' in path.parts and path.is_file() for path in paths), paths\n"
        "print(find_function('brief')(['p'], ['four letters']))\n"
    )
    assert run(installed / "python", "-c", code, cwd=tmp_path) == "[-0.2]\n"
