"""Values as they are written in a recipe or after an option, and as their field takes them.

YAML reads `no` as false, `007` as seven, `2024-01-01` as a date and `#1` as nothing. What is written is kept beside
what YAML reads, and the field decides: a field for text takes what is written, another one what is read.
"""

import re
import types
import typing
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import yaml


@dataclass(frozen=True, eq=False)
class Written:
    """A value that YAML reads as something else than text, and the text that it was."""

    text: str
    value: Any

    def __eq__(self, other: object) -> bool:
        """Equal to the value that it stands for."""
        return self.value == (other.value if isinstance(other, Written) else other)

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return self.text


class Loader(yaml.SafeLoader):
    """YAML 1.1 with numbers such as 1e-3, whose plain scalars are `Written` and whose keys are texts."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """What a node holds; a plain scalar that is no text as `Written`."""
        value = super().construct_object(node, deep=deep)
        is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return Written(node.value, value) if is_plain and not isinstance(value, str) else value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """{key as it is written: value}. Raises ConstructorError for keys that are no scalars or stand there twice."""
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "expected a mapping", node.start_mark)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no text", key.start_mark)
            if key.value in seen:
                reason = f"the key {key.value!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, reason, key.start_mark)
            seen.add(key.value)
        self.flatten_mapping(node)  # what `<<` brings in may be overridden
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


_NULLS = ("null", "Null", "NULL", "~")


def load_yaml(text: str) -> Any:
    """What a YAML text holds. Raises yaml.YAMLError, whatever is wrong with it."""
    try:
        content = yaml.load(text, Loader)
        plain(content)  # a list that holds itself has no end
        return content
    except (ValueError, OverflowError, RecursionError, TypeError, AttributeError) as error:
        # A date such as 2024-99-99, an integer such as 0b, brackets in brackets: PyYAML lets Python's errors through.
        raise yaml.YAMLError(str(error) or type(error).__name__) from None


def parse_value(text: str) -> Any:
    """The value after an option, read as YAML: numbers, true/false, null, [lists], {mappings}, text."""
    try:
        value = load_yaml(text) if text.strip() else text
    except yaml.YAMLError:
        return text
    read = value.value if isinstance(value, Written) else value
    is_bare_mapping = isinstance(read, dict) and not text.startswith("{")  # a path or prompt with a colon
    is_comment = read is None and text.strip() not in _NULLS  # a path or prompt that begins with #
    if is_bare_mapping or is_comment or read == text:
        return text
    return Written(text, read)


def plain(value: Any) -> Any:
    """A value as YAML reads it, inside lists and mappings too."""
    if isinstance(value, Written):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def convert(value: Any, hint: Any) -> Any:
    """A value as a field of this type takes it. Raises TypeError.

    The plain types (bool, int, float, str, None, lists of them and unions) are checked; the others are left to their
    owner.
    """
    options = _options(hint)
    read = plain(value)
    texts = [option for option in options if option is str or (isinstance(option, type) and issubclass(option, Enum))]
    known = [option for option in options if option in _PLAIN or option in texts]
    for option in options:
        if option is not str and option in _PLAIN and type(read) is option:
            return read
    if isinstance(read, list | dict) and any(_origin(option) is type(read) for option in options):
        element = next(option for option in options if _origin(option) is type(read))
        return _elements(value, read, element)
    text = value.text if isinstance(value, Written) else value
    if isinstance(text, str) and any(text in typing.get_args(option) for option in options):  # one of a Literal
        return text
    if texts and isinstance(text, str):
        return text
    if float in options and type(read) is int:
        return _to_float(read)
    if int in options and type(read) is float and read.is_integer():
        return int(read)
    if len(known) < len(options):
        return read
    raise TypeError


def describe(hint: Any) -> str:
    """A type in words."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    return " or ".join(names.get(option, getattr(option, "__name__", str(option))) for option in _options(hint))


_PLAIN = (bool, int, float, str, types.NoneType)


def _options(hint: Any) -> tuple[Any, ...]:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _origin(option: Any) -> Any:
    return typing.get_origin(option) or option


def _elements(value: Any, read: Any, hint: Any) -> Any:
    """A list whose elements are texts as written, anything else as read."""
    written = value.value if isinstance(value, Written) else value
    if not isinstance(read, list) or typing.get_args(hint) != (str,):
        return read
    return [item.text if isinstance(item, Written) else plain(item) for item in written]


def _to_float(number: int) -> float:
    try:
        return float(number)
    except OverflowError:
        raise TypeError from None
