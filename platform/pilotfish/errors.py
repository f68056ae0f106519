"""Every error a user can cause, so that callers can catch one family.

    PilotfishError
    ├── ConfigError (ValueError)         a config file, override or argument
    ├── DataError (ValueError)           a row, a file or a column of a data set
    ├── PromptError (ValueError)         one prompt or its sampling parameters
    ├── VocabMismatchError (ValueError)  a token guide trained for another vocabulary
    └── CheckpointError (RuntimeError)   a model or guide folder that cannot be loaded

Each message says what, got, wanted, and what to do. Broken invariants of our own are `assert`s.
"""


class PilotfishError(Exception):
    """Base class of the errors Pilotfish raises on purpose."""


class ConfigError(PilotfishError, ValueError):
    """A config file, an override or a constructor argument cannot be honoured."""


class DataError(PilotfishError, ValueError):
    """A data set, or one row of it, is not what was promised."""


class PromptError(PilotfishError, ValueError):
    """One prompt, or its sampling parameters, cannot be decoded."""


class VocabMismatchError(PilotfishError, ValueError):
    """A token guide and a base model do not share a vocabulary."""


class CheckpointError(PilotfishError, RuntimeError):
    """A model or guide folder is missing, damaged or of another kind."""
