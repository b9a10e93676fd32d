"""Errors that users see. Each message names the field or row, the value, and the next step; all travel between processes."""


class CtrlRayError(Exception):
    """Base of every error that ctrlray raises on purpose; the CLI prints its message and exits with `exit_code`."""

    exit_code = 1


class ConfigError(CtrlRayError, ValueError):
    """A job file, a flag or a model folder does not say what is needed."""

    exit_code = 2


class DataError(CtrlRayError, ValueError):
    """A table or an input file breaks its contract."""

    exit_code = 3


class ClusterError(CtrlRayError, RuntimeError):
    """The cluster cannot hold the job, or a part of it died more often than allowed."""

    exit_code = 4


class StorageError(CtrlRayError, OSError):
    """A run's storage cannot be written to or read from."""

    exit_code = 5
