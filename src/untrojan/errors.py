"""Everything untrojan raises or warns about.

::

    UntrojanError
    ├── ModelError        the network or its weights cannot be used
    ├── UnsafeFileError   the file wants to run code to be read
    ├── DataError         the images or labels cannot be used
    ├── ConfigError       a method, an option or a path was asked for that does not exist or fit
    └── RecordError       a record, a change file or a model do not belong together

    UntrojanWarning
    ├── NoEffectWarning    a method changed nothing
    └── UnreliableWarning  the result stands on too little

`cause`, `plain`, `visible`, `labelled` and `enumerated` put what came from elsewhere into their texts.
"""

from collections.abc import Iterable, Sequence

_LISTED = 20


class UntrojanError(Exception):
    """Base of every error that untrojan raises on purpose; its text is meant for the user."""


class ModelError(UntrojanError):
    """The network or its weights cannot be used."""


class UnsafeFileError(UntrojanError):
    """The file holds more than tensors and would have to run code to be read."""


class DataError(UntrojanError):
    """The images or labels cannot be used."""


class ConfigError(UntrojanError):
    """A method, an option or a path was asked for that does not exist or does not fit."""


class RecordError(UntrojanError):
    """A record, a change file and a model do not belong together."""


class UntrojanWarning(UserWarning):
    """Base of every warning that untrojan gives."""


class NoEffectWarning(UntrojanWarning):
    """A method ran and changed nothing."""


class UnreliableWarning(UntrojanWarning):
    """The result stands on too few images or on a step that did not reach its goal."""


def cause(error: Exception) -> str:
    r"""The type of an error and the first paragraph of what it says, as one line for a message.

    Example:
        >>> cause(ValueError("no\nmore"))
        'ValueError: no more'
    """
    # torch says at length why it refuses a pickle before it says what it refused.
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n\n")[0]
    text = " ".join(text.split())
    return f"{type(error).__name__}: {plain(text)}" if text else type(error).__name__


def plain(text: str) -> str:
    r"""Text from an untrusted file, cut to 200 characters and as it may be shown on a terminal.

    Example:
        >>> print(plain("\x1b[31mred"))
        '\x1b[31mred'
    """
    text = text if len(text) <= 200 else text[:200] + "…"
    return text if text.isprintable() else ascii(text)


def visible(text: str) -> str:
    r"""Text that may hold names from untrusted files, so that none steers a terminal or turns the words around it.

    Example:
        >>> print(visible("a\x1b[31m\nb"))
        a\x1b[31m
        b
    """
    return "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)


def labelled(label: int, class_names: Sequence[str] | None) -> str:
    """A label as a person reads it: its number, and its class name where there is one.

    Example:
        >>> labelled(1, ["cat", "dog"]), labelled(2, ["cat", "dog"])
        ('1 (dog)', '2')
    """
    names = class_names or ()
    return f"{label} ({plain(names[label])})" if 0 <= label < len(names) else str(label)


def utf8(text: str) -> str:
    r"""Text that UTF-8 can hold, which names of files need not be.

    Example:
        >>> print(utf8("caf\udce9"))
        caf\udce9
    """
    return text.encode("utf-8", "backslashreplace").decode()


def enumerated(texts: Iterable[str], separator: str) -> str:
    """The first twenty of many texts from an untrusted file, and how many more there are.

    Example:
        >>> enumerated(["a", "b"], ", ")
        'a, b'
    """
    shown = [plain(text) for text in texts]
    rest = [f"and {len(shown) - _LISTED} more"] if len(shown) > _LISTED else []
    return separator.join(shown[:_LISTED] + rest)
