"""Holds the floors of docs/architecture.md: who may import whom, and a few rules that only discipline would keep."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "uhd_jax"
FLOORS = {
    "cli": 7,
    **dict.fromkeys(("analysis", "evaluation", "serving"), 6),
    **dict.fromkeys(("training", "generation"), 5),
    "models": 4,
    **dict.fromkeys(("convert", "data", "cost"), 3),
    **dict.fromkeys(("sharding", "checkpoint", "slicing"), 2),
    **dict.fromkeys(("config", "batch", "ops"), 1),
}
# Room -> packages it must not import, neither at the top of a file nor inside a function.
FORBIDDEN = {
    "slicing": {"jax", "jaxlib", "flax"},
    "ops": {"flax"},
    "models": {"uhd_jax.data", "orbax", "grain"},
}
SERVING = {"h11", "prometheus_client", "pydantic", "starlette", "uvicorn"}  # the extra "serve"
ONLY = {
    "orbax": {"checkpoint"},
    "torch": {"analysis", "convert.pickles"},
    "transformers": {"analysis"},
    "torchvision": set(),
    "flax.linen": {"models"},
    **dict.fromkeys(SERVING, {"serving"}),
}
# Imported where used, with a clear error when absent.
OPTIONAL = {"torch", "transformers", "av", "fsspec", "lmms_eval", "pyarrow", *SERVING}
MAX_LINES = 450


def room_of(module: str) -> str | None:
    """`uhd_jax.data.chat` -> `data`; None for the package itself and for what is not ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def imported(tree: ast.Module, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, absolute name) of every import of a module, also those inside functions and under `if TYPE_CHECKING`."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            found += [(node.lineno, name) for name in names]
    return found


def starts_with(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """Every broken rule of one module, as `module:line: what`."""
    tree = ast.parse(source)
    room = room_of(module)
    problems = []

    def report(line: int, what: str) -> None:
        problems.append(f"{module}:{line}: {what}")

    if not ast.get_docstring(tree):
        report(1, "no docstring")
    if source.count("\n") > MAX_LINES:
        report(MAX_LINES, f"more than {MAX_LINES} lines")
    if room and room not in FLOORS and room != "__main__":
        report(1, f"room {room!r} is on no floor")
    for line, name in imported(tree, module, is_package):
        other = room_of(name)
        if other in FLOORS and room in FLOORS and other != room and FLOORS[other] >= FLOORS[room]:
            report(line, f"{room} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[other]})")
        if other == "cli" and room not in ("cli", "__main__"):
            report(line, f"imports {name}: nothing imports the command line")
        for package in FORBIDDEN.get(room, ()):
            if starts_with(name, package):
                report(line, f"{room} imports {name}")
        for package, rooms in ONLY.items():
            if starts_with(name, package) and not {room, module.removeprefix(f"{PACKAGE}.")} & rooms:
                report(line, f"imports {name}, allowed in: {', '.join(sorted(rooms)) or 'no room'}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and room != "models":
            if any(ast.unparse(base).endswith(("nn.Module", "linen.Module")) for base in node.bases):
                report(node.lineno, f"class {node.name} is a module outside models/")
        if isinstance(node, ast.Assign) and "MAX_IMAGE_PIXELS" in ast.unparse(node.targets[0]):
            report(node.lineno, "changes Pillow's limit against decompression bombs")
    return problems


def modules() -> list[tuple[str, Path]]:
    return sorted(
        (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path)
        for path in (ROOT / PACKAGE).rglob("*.py")
    )


@pytest.mark.parametrize(("module", "path"), modules(), ids=[module for module, _ in modules()])
def test_module_keeps_the_rules(module, path):
    assert violations(module, path.read_text(), path.name == "__init__.py") == []


def test_every_folder_is_a_package():
    folders = {path.parent for _, path in modules()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("uhd_jax.models.vit", "from uhd_jax.training import loop", "models (floor 4) imports uhd_jax.training.loop"),
        ("uhd_jax.models.vit", "def f():\n    import uhd_jax.data.chat", "models imports uhd_jax.data.chat"),
        ("uhd_jax.models.vit", "import orbax.checkpoint as ocp", "models imports orbax.checkpoint"),
        ("uhd_jax.data.chat", "from uhd_jax import cost", "data (floor 3) imports uhd_jax.cost (floor 3)"),
        ("uhd_jax.data.chat", "from ..models import vit", "imports uhd_jax.models.vit (floor 4)"),
        ("uhd_jax.slicing.plan", "import jax.numpy as jnp", "slicing imports jax.numpy"),
        ("uhd_jax.slicing.plan", "def f():\n    from jax import numpy", "slicing imports jax.numpy"),
        ("uhd_jax.ops.rope", "from flax import linen", "ops imports flax.linen"),
        ("uhd_jax.training.step", "import flax.linen as nn", "imports flax.linen, allowed in: models"),
        ("uhd_jax.training.loop", "import orbax.checkpoint", "imports orbax.checkpoint, allowed in: checkpoint"),
        ("uhd_jax.convert.hf", "import torch", "imports torch, allowed in: analysis"),
        ("uhd_jax.convert.hf", "importlib.import_module('torch.nn')", "imports torch.nn, allowed in: analysis"),
        ("uhd_jax.analysis.report", "from uhd_jax.cli import main", "nothing imports the command line"),
        ("uhd_jax.analysis.report", "from uhd_jax.evaluation import runs", "imports uhd_jax.evaluation.runs (floor 6)"),
        ("uhd_jax.training.step", "class Head(nn.Module): pass", "class Head is a module outside models/"),
        ("uhd_jax.slicing.image_io", "Image.MAX_IMAGE_PIXELS = None", "changes Pillow's limit"),
        ("uhd_jax.attic.old", "'''Old.'''", "room 'attic' is on no floor"),
        ("uhd_jax.ops.rope", "x = 1", "no docstring"),
        ("uhd_jax.ops.rope", "x = 1\n" * 451, "more than 450 lines"),
    ],
)
def test_checker_sees_violations(module, source, expected):
    problems = violations(module, source)
    assert any(expected in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("uhd_jax.models.vit", "'''Vision.'''\nfrom flax import linen as nn\nclass Vit(nn.Module): pass"),
        ("uhd_jax.checkpoint", "'''Saving.'''\nimport orbax.checkpoint as ocp\nfrom uhd_jax import config"),
        ("uhd_jax.cli.train", "'''Train.'''\nfrom uhd_jax.cli import configs\nfrom uhd_jax.training import loop"),
        ("uhd_jax.data.chat", "'''Chat.'''\nimport numpy\nfrom . import packing\nfrom ..slicing import plan"),
    ],
)
def test_checker_accepts_what_is_allowed(module, source):
    assert violations(module, source) == []


def test_relative_imports_inside_a_package_file_are_resolved():
    source = "'''Data.'''\nfrom ..models import vit"
    assert violations("uhd_jax.data", source, is_package=True) == [
        "uhd_jax.data:2: data (floor 3) imports uhd_jax.models.vit (floor 4)"
    ]


def committed_text_files() -> list[Path]:
    folders = (".ci", "configs", "docs", "launch", "tests", PACKAGE)
    suffixes = {"", ".md", ".py", ".sh", ".toml", ".txt", ".json", ".yml", ".yaml", ".cfg"}
    files = [path for path in ROOT.iterdir() if path.name not in ("LICENSE", ".git")]  # .git is a file in a worktree
    files += [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(path for path in files if path.is_file() and path.suffix in suffixes)


def test_no_file_names_a_machine():
    """Paths under these roots exist on one machine only; a file that names one was not meant for others."""
    pattern = re.compile(r"(?<![\w.~-])/(?:root|home|work|opt|srv|Users)/")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in committed_text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_dependencies_name_no_hosts_and_no_upper_bounds():
    requirements = (ROOT / "requirements.txt").read_text()
    pins = [*ROOT.glob("requirements*"), *ROOT.glob("*.lock"), ROOT / "pyproject.toml"]
    for path in [*pins, *filter(Path.is_file, (ROOT / "launch").rglob("*"))]:
        assert "://" not in path.read_text(), path
    for line in requirements.splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.-]+>=[0-9.]+", line), line


def test_requirements_are_exactly_what_is_imported():
    """An undeclared package works only where something else installs it; an unused one makes every install slower."""

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    distributions = metadata.packages_distributions()
    declared = {normal(line.partition(">=")[0]) for line in (ROOT / "requirements.txt").read_text().splitlines()[1:]}
    tops = {
        name.split(".")[0]
        for module, path in modules()
        for _, name in imported(ast.parse(path.read_text()), module, path.name == "__init__.py")
    }
    owners = {top: {normal(owner) for owner in distributions.get(top, [])} for top in tops - {PACKAGE} - OPTIONAL}
    assert [top for top in owners if top not in sys.stdlib_module_names and not owners[top] & declared] == []
    assert declared - set().union(*owners.values()) == set()


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
