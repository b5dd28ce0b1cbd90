"""Errors that a user can mend: each message names the file, field or range, and the remedy."""


class UserError(Exception):
    """Bad input. The command line prints the message alone, without a traceback."""


class Unsupported(UserError):
    """An editor cannot run on this model, layer or regime. A study records it as a row and goes on."""
