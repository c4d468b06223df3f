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
"""


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
