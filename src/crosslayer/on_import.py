"""What is done once other modules have been imported, whenever that is: so that importing this package imports little.

    after(("peft",), "crosslayer.lor2c:")                      # imports crosslayer.lor2c once peft is there
    after(("json",), "crosslayer.crnet.registration:register_models")

Nothing is done in the middle of an import of `WATCHED` packages, whose modules import each other in circles: it waits
for the outermost one to end.
"""

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

WATCHED = ("crosslayer", "peft", "transformers")


@dataclass
class _Rule:
    modules: tuple[str, ...]
    action: str
    is_done: bool = False

    def is_due(self) -> bool:
        return not self.is_done and any(map(_is_imported, self.modules))

    def carry_out(self) -> None:
        module, _, function = self.action.partition(":")
        found = import_module(module)
        if function:
            getattr(found, function)()
        self.is_done = True


def _is_imported(name: str) -> bool:
    if name.endswith("*"):
        return any(module.startswith(name[:-1]) for module in list(sys.modules))
    return name in sys.modules


class _State(threading.local):
    depth = 0  # of imports within one another
    is_settling = False


class _Watch(MetaPathFinder):
    """Finds modules as the other finders do, and looks at the rules when the outermost import of one has ended."""

    def __init__(self) -> None:
        self.rules: list[_Rule] = []
        self.state = _State()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in WATCHED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: Loader) -> None:
        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)  # the loader's own again
            self.state.depth += 1
            try:
                loader.exec_module(module)
            finally:
                self.state.depth -= 1
            self.settle()

        loader.exec_module = exec_module  # type: ignore[method-assign]

    def settle(self) -> None:
        """Carries out what is due, unless an import is under way."""
        if self.state.depth or self.state.is_settling:
            return
        self.state.is_settling = True
        try:
            while due := [rule for rule in self.rules if rule.is_due()]:
                due[0].carry_out()
        finally:
            self.state.is_settling = False


_WATCH = _Watch()


def after(modules: tuple[str, ...], action: str) -> None:
    """Once one of `modules` has been imported, which may be long ago: import a module and call a function of it.

    Args:
        modules: full names, in packages of `WATCHED`; "name*" is any that begins so.
        action: "module:function", or "module:" where importing it is enough.
    """
    if _WATCH not in sys.meta_path:
        sys.meta_path.insert(0, _WATCH)
    _WATCH.rules.append(_Rule(modules, action))
    _WATCH.settle()


__all__ = ["WATCHED", "after"]
