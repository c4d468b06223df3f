"""The class is the config: find, build and describe scanners, defenses and attacks.

A method is a :func:`config` with a `name`, in a file of its own. Putting the file
into the folder of its kind is all it takes to add one: the command line, the documentation and the records
read the class through this module.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from untrojan.errors import ConfigError, plain
from untrojan.writing import sha256

T = TypeVar("T")


class FieldInfo(NamedTuple):
    """One field of a method.

    `default` is `dataclasses.MISSING` where a value must be given; `help` is the field's text in the
    docstring's `Attributes:` or `Args:` section, on one line.
    """

    name: str
    annotation: Any
    default: Any
    help: str


class Documentation(NamedTuple):
    """The docstring of a method, taken apart.

    `summary` is its first line and `text` the paragraphs behind it; `sections` are those of Google style, such as
    `Needs`, by name and without their indentation.
    """

    summary: str
    text: str
    sections: dict[str, str]

    def line(self, section: str) -> str:
        """Give a section on one line, empty where there is none."""
        return " ".join(self.sections.get(section, "").split())

    @property
    def references(self) -> list[str]:
        """The papers, each on one line; one ends where a line of `References` ends in a period."""
        entries = re.split(r"(?<=\.)\n+", self.sections.get("References", ""))
        return [" ".join(entry.split()) for entry in entries if entry]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field, dataclasses.field))
def config(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only pydantic dataclass that raises a ConfigError where a field or value is wrong.

    Text is converted to the type of the field. The text of the error tells about all fields that are unknown, missing
    or have a bad value, and which there are.

    Example:
        >>> @config
        ... class Stew:
        ...     hours: int = 2
        >>> Stew(hours="4").hours
        4
        >>> Stew(days=1)
        Traceback (most recent call last):
        untrojan.errors.ConfigError: Stew: `days` is not a field; it takes hours=2
    """
    made: Any = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)
    init = made.__init__

    @functools.wraps(init)
    def checked(self: T, **values: Any) -> None:
        try:
            init(self, **values)
        except ValidationError as error:
            raise ConfigError(told(cls, error)) from error

    made.__init__ = checked
    return made


def told(cls: type, error: ValidationError, said: Callable[[str], str] = str) -> str:
    """Say what is wrong with values for a configuration, and what it takes.

    Args:
        cls: Its class.
        error: What pydantic says.
        said: How the name of a field is written.
    """
    problems = "; ".join(_problem(each, said) for each in error.errors())
    known = ", ".join(_signature(field, said) for field in fields(cls)) or "nothing"
    return f"{getattr(cls, 'name', cls.__name__)}: {problems}; it takes {known}"


def require_kind(given: object, base: type) -> None:
    """Raise a ConfigError where something else was given than a method of one kind."""
    if not isinstance(given, base):
        raise ConfigError(f"expected a method of kind {base.__name__}, got {given!r}; registry.parse reads text")


def discover(package: str, base: type[T]) -> dict[str, type[T]]:
    """Find every method of one kind.

    Args:
        package: Dotted name of the package whose modules define the methods.
        base: What all of them derive from.

    Returns:
        The concrete subclasses of `base` defined in the package's own modules, by their `name`, sorted.

    Raises:
        ConfigError: Two classes share a name, or one has none.

    Example:
        >>> from untrojan.lab.attack import Attack
        >>> "badnets" in discover("untrojan.lab.attacks", Attack)
        True
    """
    found: dict[str, type[T]] = {}
    for module in _modules(package):
        for cls in _defined(module, base):
            name = getattr(cls, "name", None)
            if not isinstance(name, str):
                raise ConfigError(f"expected a class variable `name` on {_path(cls)}, got {name!r}")
            if name in found:
                raise ConfigError(f"expected one method named {name!r}, got {_path(found[name])} and {_path(cls)}")
            found[name] = cls
    return dict(sorted(found.items()))


def parse(spec: str, package: str, base: type[T]) -> T:
    """Build a method from text such as `badnets:size=4,row=27`.

    A comma ends a value only where `key=` follows, so that paths may hold commas.

    Args:
        spec: The method's name, alone or with `:key=value,key=value` behind it.
        package: Where to look for the method, as in :func:`discover`.
        base: What the method derives from.

    Returns:
        The method; fields left out have their defaults.

    Raises:
        ConfigError: There is no such method, or a field is unknown, given twice, missing or has a bad value.

    Example:
        >>> from untrojan.lab.attack import Attack
        >>> parse("badnets:size=4,row=27", "untrojan.lab.attacks", Attack)
        BadNets(pattern='square', size=4, row=27, col=None, value=1.0)
    """
    name, _, rest = spec.partition(":")
    classes = discover(package, base)
    if name not in classes:
        raise ConfigError(f"no {base.__name__.lower()} is named {name!r}; expected one of {', '.join(classes)}")
    values: dict[str, str] = {}
    for pair in re.split(r",(?=\w+=)", rest) if rest else []:
        key, equals, value = pair.partition("=")
        if not equals or key in values:
            problem = "given twice" if equals else "no key=value"
            raise ConfigError(f"{spec}: {pair!r} is {problem}; write {name}:key=value,key=value, each key once")
        values[key] = value
    return classes[name](**values)


def read_toml(cls: type[T], path: str | Path) -> T:
    """Build a configuration from a TOML file.

    Args:
        cls: Its class, a pydantic dataclass.
        path: The file.

    Raises:
        ConfigError: The file cannot be read, is not TOML, or holds other things than the class has; the text tells
            about all of them.

    Example:
        >>> import tempfile
        >>> from untrojan.lab.attacks.badnets import BadNets
        >>> with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        ...     _ = Path(file.name).write_text("size = 4")
        ...     read_toml(BadNets, file.name).size
        4
    """
    try:
        return TypeAdapter(cls).validate_python(tomllib.loads(Path(path).read_text("utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(map(_problem, error.errors()))}") from error
    except ValueError as error:  # not TOML, or not text
        raise ConfigError(f"expected TOML in {path}: {error}") from error


def fields(cls: type) -> list[FieldInfo]:
    """List the fields of a method in their order, inherited ones included.

    Args:
        cls: The method's class, a pydantic dataclass.

    Returns:
        Name, type, default and help of every field.

    Example:
        >>> from untrojan.lab.attacks.badnets import BadNets
        >>> fields(BadNets)[1][:3]
        ('size', <class 'int'>, 3)
    """
    texts = {name: text for part in reversed(cls.__mro__) for name, text in _documented(part.__doc__ or "")}
    return [
        FieldInfo(
            name=name,
            annotation=field.annotation,
            default=dataclasses.MISSING if field.is_required() else field.get_default(call_default_factory=True),
            help=texts.get(name, ""),
        )
        for name, field in getattr(cls, "__pydantic_fields__").items()  # noqa: B009
    ]


def describe(instance: object) -> dict[str, Any]:
    """Give every field of a method, defaults included, as values that JSON can hold.

    Args:
        instance: The method.

    Returns:
        Field values by name; paths are text.

    Example:
        >>> from untrojan.lab.attacks.badnets import BadNets
        >>> describe(BadNets(size=4))
        {'pattern': 'square', 'size': 4, 'row': None, 'col': None, 'value': 1.0}
    """
    return TypeAdapter(type(instance)).dump_python(instance, mode="json")


def files(instance: object) -> dict[str, Path]:
    """Give the fields of a method that name a file.

    Args:
        instance: The method.

    Example:
        >>> import tempfile
        >>> from untrojan.lab.attacks.additive import Additive
        >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
        ...     list(files(Additive(image=file.name)))
        ['image']
    """
    held = {name: getattr(instance, name) for name in describe(instance)}
    return {name: value for name, value in held.items() if isinstance(value, Path)}


def identity(instance: Any) -> dict[str, Any]:
    """Give what decides what a method does, as values that JSON can hold: hashes of files instead of their paths.

    Args:
        instance: The method.

    Returns:
        Its `name`, and its `fields` by name.

    Raises:
        ConfigError: A file cannot be read.

    Example:
        >>> import tempfile
        >>> from untrojan.lab.attacks.additive import Additive
        >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
        ...     identity(Additive(image=file.name))  # doctest: +ELLIPSIS
        {'name': 'additive', 'fields': {'image': 'e3b0c442...'}}
    """
    contents = {name: _content(path) for name, path in files(instance).items()}
    return {"name": instance.name, "fields": describe(instance) | contents}


def spec(instance: object) -> str:
    """Write a method as the shortest text that :func:`parse` makes it from; fields with their default are left out.

    Args:
        instance: The method.

    Example:
        >>> from untrojan.lab.attacks.badnets import BadNets
        >>> spec(BadNets(size=4)), spec(BadNets())
        ('badnets:size=4', 'badnets')
    """
    told = describe(instance)
    given = [
        f"{field.name}={told[field.name]}"
        for field in fields(type(instance))
        if getattr(instance, field.name) != field.default
    ]
    name = getattr(instance, "name", type(instance).__name__)
    return f"{name}:{','.join(given)}" if given else name


def documentation(cls: type) -> Documentation:
    r"""Take the docstring of a method apart; sections that it inherits do not count.

    Args:
        cls: The method's class.

    Example:
        >>> class Stew:
        ...     '''Slow food.
        ...
        ...     Cooked for hours.
        ...
        ...     Needs:
        ...         A pot
        ...         with a lid.
        ...     '''
        >>> documentation(Stew)
        Documentation(summary='Slow food.', text='Cooked for hours.', sections={'Needs': 'A pot\nwith a lid.'})
        >>> documentation(Stew).line("Needs")
        'A pot with a lid.'
    """
    told, *parts = re.split(r"^(\w+):\n(?=[ \n])", inspect.cleandoc(cls.__doc__ or ""), flags=re.MULTILINE)
    summary, _, text = told.partition("\n")
    sections = {name: textwrap.dedent(part).strip("\n") for name, part in zip(parts[::2], parts[1::2], strict=True)}
    return Documentation(summary.strip(), text.strip(), sections)


def _modules(package: str) -> Iterator[ModuleType]:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, prefix=f"{package}."):
        yield importlib.import_module(module.name)


def _defined(module: ModuleType, base: type[T]) -> Iterator[type[T]]:
    for cls in vars(module).values():
        own = inspect.isclass(cls) and cls.__module__ == module.__name__
        if own and issubclass(cls, base) and not inspect.isabstract(cls):
            yield cls


def _content(path: Path) -> str:
    try:
        return sha256(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _problem(error: Any, said: Callable[[str], str] = str) -> str:
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    field = said(".".join(map(str, error["loc"])))
    if kind == "unexpected_keyword_argument":
        return f"`{field}` is not a field"
    if kind == "missing":
        return f"`{field}` must be given"
    if not error["loc"]:
        return message
    return f"`{field}`: {message[0].lower()}{message[1:]}, got {plain(repr(error['input']))}"


def _signature(field: FieldInfo, said: Callable[[str], str]) -> str:
    default = "" if field.default in (dataclasses.MISSING, None) else f"={field.default}"
    return f"{said(field.name)}{default}"


def _documented(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each entry of the Google-style sections that describe fields."""
    for section in re.finditer(
        r"^(?:Attributes|Args):\n((?:\n|[ ]+.*\n?)+)", inspect.cleandoc(docstring), re.MULTILINE
    ):
        for entry in re.finditer(r"^[ ]{4}(\w+)(?: \(.*?\))?: (.*(?:\n[ ]{5,}.*)*)", section[1], re.MULTILINE):
            yield entry[1], " ".join(entry[2].split())
