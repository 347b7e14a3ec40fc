"""The error that ends a command with one line instead of a traceback."""


class UserError(Exception):
    """Says what is wrong with a request, and what would be right."""
