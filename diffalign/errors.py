"""The errors a user can cause. The command line prints them as one sentence and exits with status 2."""

from __future__ import annotations


class UserError(ValueError):
    """The user's mistake: the message is one sentence that names the field, the value and the remedy."""


class ConfigError(UserError):
    """A configuration value is wrong.

    Args:
        field (`str`): the field's path, e.g. ``beta`` or ``train.beta``; the loader puts the section in front.
        problem (`str`): what was expected, what was found, what to do.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem

    def within(self, section: str) -> ConfigError:
        """The same error, its field inside `section`."""
        return ConfigError(f"{section}.{self.field}", self.problem)
