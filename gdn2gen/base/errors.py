"""Every exception of gdn2gen. Messages carry what was given, what was expected, and the remedy."""

from __future__ import annotations


class Gdn2genError(Exception):
    """Base of everything that gdn2gen raises on purpose."""


class InputError(Gdn2genError, ValueError):
    """An argument of an op is of the wrong rank, shape, dtype, device or value."""


class UnsupportedError(Gdn2genError, ValueError):
    """The call is well formed, but outside what was built and verified."""


class ConfigError(Gdn2genError, ValueError):
    """A config names an unknown knob, a value outside its domain, or an invalid combination."""


class TemplateError(Gdn2genError):
    """A template does not render, or renders to something that is not Python."""


class BuildError(Gdn2genError):
    """A rendered kernel does not compile, or does not fit the device."""


class DeviceError(Gdn2genError):
    """No GPU is present, or the name of a target is unknown."""


class DispatchError(Gdn2genError):
    """Strict mode found no exact entry, or no plan fits."""


class FileError(Gdn2genError, OSError):
    """A path is not one that may be written: a device, a folder, a read-only file."""


class StoreError(Gdn2genError):
    """A tuned file cannot be written, or an import is not a tuned file."""


class TuneError(Gdn2genError):
    """The tuner cannot start, resume or finish a study."""


class TunedFileWarning(UserWarning):
    """A tuned file was ignored: truncated, of an unknown schema, or for another GPU."""
