"""The shape of the package: imports point downwards, crnet's files can travel alone, the type marker ships."""

import ast
import importlib.util
import inspect
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(importlib.util.find_spec("crosslayer").origin).parent

# crnet, lor2c, recipes <- accounting, analysis <- data, loading, train, evaluate <- bench, compare <- cli
LEVELS = [
    {"crnet", "lor2c", "recipes"},
    {"accounting", "analysis"},
    {"data", "train", "evaluate", "loading", "quantization"},
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


# Sizes and depths


MOST_LINES = {"analysis/spectra.py": 500}  # others: 450


def test_no_file_is_long():
    long = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in modules()}
    assert not {name: count for name, count in long.items() if count > MOST_LINES.get(name, 450)}


def module_name(path):
    parts = ("crosslayer", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_at_once(path, known):
    """Modules of ours that importing this one imports, apart from the packages they are in."""
    lines = {node.lineno for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)}
    for line, name in imports_of(path):
        if line in lines:
            yield name if name in known else name.rpartition(".")[0]


def depth(name, graph, above=()):
    """Length of the longest chain of imports below a module."""
    assert name not in above, f"a circle: {' -> '.join([*above, name])}"
    return max((1 + depth(below, graph, (*above, name)) for below in graph.get(name, ())), default=0)


@pytest.mark.parametrize("package", sorted(LEVEL_OF.keys() - {"loading", "quantization", "recipes"}))
def test_imports_within_a_package_are_shallow(package):
    names = {module_name(path): path for path in (ROOT / package).rglob("*.py") if path.stem != "__init__"}
    graph = {name: set(imported_at_once(path, names)) & names.keys() for name, path in names.items()}
    assert max(depth(name, graph) for name in names) <= 7


def test_levels_are_few():
    assert len(LEVELS) + 1 <= 7  # COMMON below them


def test_the_depth_can_fail():
    assert depth("a", {"a": {"b"}, "b": {"c"}}) == 2
    with pytest.raises(AssertionError, match="a circle: a -> b -> a"):
        depth("a", {"a": {"b"}, "b": {"a"}})


def lines_of_code(path):
    """Blank lines, comments and docstrings do not count."""
    text = path.read_text()
    ignored = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            ignored |= set(range(node.lineno, node.end_lineno + 1))
    numbered = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and at not in ignored for at, line in numbered)


def test_there_is_nearly_as_much_test_as_code():
    tests = sum(map(lines_of_code, Path(__file__).parents[1].rglob("*.py")))
    assert tests >= 0.85 * sum(map(lines_of_code, modules()))


# Docstrings and hints


def is_inherited(cls, name):
    """Whether another package says what a method is."""
    return any(name in vars(base) for base in cls.__mro__[1:] if not base.__module__.startswith("crosslayer"))


def public_functions(module):
    """(name, function) of what a module defines for others, properties and methods of its classes among them."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            yield name, value
            for method, function in vars(value).items():
                function = getattr(function, "fget", None) or getattr(function, "func", None) or function
                function = inspect.unwrap(getattr(function, "__func__", function))
                is_own = getattr(function, "__module__", None) == module.__name__ and not is_inherited(value, method)
                if not method.startswith("_") and inspect.isfunction(function) and is_own:
                    yield f"{name}.{method}", function
        elif inspect.isfunction(inspect.unwrap(value)):
            yield name, inspect.unwrap(value)


def lacks(function):
    """What a reader of a function misses."""
    if not function.__doc__:
        yield "a docstring"
    if inspect.isfunction(function):
        signature = inspect.signature(function)
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        for name, parameter in signature.parameters.items():
            if parameter.annotation is parameter.empty and name not in ("self", "cls") and parameter.kind not in kinds:
                yield f"a hint of {name}"
        if signature.return_annotation is signature.empty:
            yield "a hint of what it returns"


PUBLIC = [module_name(p) for p in modules() if p.stem != "__main__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_says_what_it_is(name):
    """In crnet/, where letters stand for tensors, docstrings give the shapes, and not every letter has a hint."""
    found = public_functions(importlib.import_module(name))
    missing = [f"{what} lacks {each}" for what, function in found for each in lacks(function)]
    assert not [line for line in missing if ".crnet." not in name or line.endswith("a docstring")]


def test_the_check_of_docstrings_can_fail():
    def undocumented(x) -> int:
        return x

    assert list(lacks(undocumented)) == ["a docstring", "a hint of x"]


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
