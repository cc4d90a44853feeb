"""What the push raises. Every message says what was given, what was expected and what to do."""


class PushRefused(ValueError):
    """The folder, the repository id or the card is not fit to publish. The command line exits with 2."""


class PushFailed(RuntimeError):
    """The Hub refused, failed, or was ahead of us; the branch is as whole as it was. The command line exits with 1."""
