"""The error that ends a command with one line instead of a traceback."""


class UserError(Exception):
    """What is wrong with what was asked for, and what would be right."""
