"""Every exception that a user's files, settings or machine can cause.

::

    RlaifError                the command line prints its message without a traceback and exits with code 2
    ├── ConfigError           a recipe or a command-line option
    ├── ConstitutionError     a constitution file
    ├── PromptError           a prompt template
    ├── DataError             a file of prompts, demonstrations or comparisons
    ├── ModelError            a model, its tokenizer or an adapter folder
    ├── EngineError           a server or cluster that was to answer: not there, refusing every question, or failing
    ├── RoleError             a model role used outside `SharedBase.acting_as`, or unknown
    ├── JournalError          a run folder: locked, damaged, or written by another version
    ├── StageError            a stage that must not go on: a judge or a reward model below its floor
    └── DeviceError           hardware that lacks what was asked for

A message says what was found, where (file and line, or key), what was expected and what to do.
"""


class RlaifError(Exception):
    """Base of all errors that a user can cause and can mend.

    Its arguments are texts or `documents.Problem`s, one for each thing that is wrong; its text is theirs, one a line.
    """

    def __str__(self) -> str:
        return "\n".join(dict.fromkeys(map(str, self.args)))


class ConfigError(RlaifError):
    """A recipe or a command-line option is wrong."""


class ConstitutionError(RlaifError):
    """A constitution file is wrong."""


class PromptError(RlaifError):
    """A prompt template is wrong, or was given the wrong variables."""


class DataError(RlaifError):
    """A row or a file of prompts, demonstrations or comparisons is wrong."""


class ModelError(RlaifError):
    """A model, a tokenizer or an adapter folder cannot be used."""


class EngineError(RlaifError):
    """A server or a cluster that was to answer cannot be reached, refuses every question, or lacks what is needed."""


class RoleError(RlaifError):
    """A model role was used outside its context, or does not exist."""


class JournalError(RlaifError):
    """A run folder is locked, damaged, or of another version."""


class StageError(RlaifError):
    """A stage refuses to go on because a measured quality is below its floor."""


class DeviceError(RlaifError):
    """The machine lacks what the recipe asks for."""
