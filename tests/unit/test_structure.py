"""The shape of the package: imports point downwards, crnet's files can travel alone, the type marker ships."""

import ast
import importlib.util
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(importlib.util.find_spec("crosslayer").origin).parent

# crnet, lor2c, recipes <- accounting, analysis <- data, loading, train, evaluate <- bench, compare <- cli
LEVELS = [
    {"crnet", "lor2c", "recipes"},
    {"accounting", "analysis"},
    {"data", "train", "evaluate", "loading"},
    {"bench", "compare"},
    {"cli"},
]
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}
# Anyone may use these; they use nobody but each other.
COMMON = {"errors", "methods", "on_import", "private", "provenance", "ranges", "workers"}


def modules():
    return sorted(ROOT.rglob("*.py"))


def imports_of(path):
    """(line, full name) of every import of our own package, wherever in the file it stands."""
    package = ("crosslayer", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "crosslayer":
                yield node.lineno, name


def part(parts):
    """The first component below crosslayer: a package, a module, or None for crosslayer itself."""
    return parts[0].removesuffix(".py") if parts else None


def upward_imports(path):
    own = part(path.relative_to(ROOT).parts)
    for line, name in imports_of(path):
        used = part(name.split(".")[1:])
        if used in COMMON or used == own or used not in LEVEL_OF:
            continue
        if own in COMMON or LEVEL_OF[used] > LEVEL_OF[own]:
            yield f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_imports_point_downwards():
    found = [line for path in modules() if path.parent != ROOT or path.stem in COMMON for line in upward_imports(path)]
    assert not found, "\n".join(found)


def test_every_part_has_a_level():
    parts = {part(path.relative_to(ROOT).parts) for path in modules()}
    assert parts <= LEVEL_OF.keys() | COMMON | {"__init__", "__main__"}, "give new packages a level in LEVELS"


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("crnet/new.py", "from crosslayer.data import pack"),
        ("crnet/new.py", "from ..train import build"),
        ("accounting/deep/new.py", "def f():\n    from ...cli import main"),
        ("data/new.py", "import crosslayer.cli.pretrain"),
        ("errors.py", "from crosslayer.crnet import CRNetConfig"),
    ],
)
def test_the_check_can_fail(where, line, tmp_path, monkeypatch):
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert len(list(upward_imports(path))) == 1


def test_crnet_is_flat():
    """A saved checkpoint carries files, not folders."""
    assert [path.name for path in (ROOT / "crnet").iterdir() if path.is_dir() and path.name != "__pycache__"] == []


def test_type_marker():
    assert (ROOT / "py.typed").is_file()


def test_public_names():
    import crosslayer

    assert crosslayer.__all__ == sorted(crosslayer.__all__)
    for name in crosslayer.__all__:
        assert getattr(crosslayer, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        crosslayer.nonsense  # noqa: B018


# Versions


def test_the_oldest_versions_are_those_that_are_tested():
    """constraints-oldest.txt, which `make test-oldest` installs, has the minima of pyproject.toml, all of them."""
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    optional = (lines for extra, lines in project["optional-dependencies"].items() if extra != "dev")
    minima = {}
    for line in [*project["dependencies"], *(line for lines in optional for line in lines)]:
        name, minimum = line.split(">=")
        minima[name] = Version(minimum)
    lines = (root / "constraints-oldest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(version) for name, version in tested.items()} == minima
