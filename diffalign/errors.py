"""The errors that a user can cause.

The command line prints them as one sentence and exits with status 2.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user.

    The message is one sentence that names the field, the value and the remedy.

    Example:
        ```python
        from diffalign import UserError, load_scorer

        try:
            load_scorer("pikscore")
        except UserError as error:
            assert "pickscore" in str(error)
        ```
    """


class ConfigError(UserError):
    """A configuration value is wrong.

    Args:
        field (`str`): path of the field, such as ``beta`` or ``train.beta``. The loader
            puts the section in front.
        problem (`str`): what was expected, what there was, and what to do.

    Example:
        ```python
        from diffalign import SFTConfig
        from diffalign.errors import ConfigError

        try:
            SFTConfig(learning_rate=-1)
        except ConfigError as error:
            assert error.field == "learning_rate"
        ```
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem

    def within(self, section: str) -> ConfigError:
        """Return the same error, with its field inside a section.

        Args:
            section (`str`): put in front of the field.
        """
        return ConfigError(f"{section}.{self.field}", self.problem)


def one_line(error: BaseException, length: int = 300) -> str:
    """Shorten the message of a library's error to one line.

    Args:
        error (`BaseException`): The error. Without a message its type is named.
        length (`int`, *optional*, defaults to `300`): Largest number of characters.
    """
    return " ".join(str(error).split())[:length] or type(error).__name__
