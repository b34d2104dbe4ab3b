"""Every error cupyinfer raises on purpose, one class per kind of cause.

All derive from :class:`CupyinferError`, so the command line catches one type and prints one line. A message names
the field, the value that was given and what is allowed, before anything ran.
"""

from __future__ import annotations


class CupyinferError(Exception):
    """Base of every deliberate error of this package."""


class ConfigError(CupyinferError, ValueError):
    """A setting, argument or model configuration value that is not allowed."""


class RequestError(CupyinferError, ValueError):
    """One request is malformed (empty prompt, token id out of range, ...). Other requests are not disturbed."""


class CheckpointError(CupyinferError):
    """A model directory that is missing, incomplete, truncated or does not match its config.json."""


class DeviceError(CupyinferError, RuntimeError):
    """A device, driver, library or kernel that was asked for is not available or refused to work."""


class OutOfMemoryError(CupyinferError, MemoryError):
    """Device memory does not suffice for what was asked; the message says how much was needed and what to lower."""


class ContractError(CupyinferError, ValueError):
    """An array handed to an op has the wrong shape, dtype, layout or device."""


def invalid(field: str, value: object, allowed: str) -> ConfigError:
    """The usual configuration error: ``field=value is not allowed; allowed: ...``."""
    return ConfigError(f"{field}={value!r} is not allowed; allowed: {allowed}")
