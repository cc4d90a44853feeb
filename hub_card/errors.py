"""What the push raises, and what no message may hold. Every message says what was given, expected, and what to do."""

import re

TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")  # what a Hub token looks like


class PushRefused(ValueError):
    """The folder, the repository id or the card is not fit to publish. The command line exits with 2."""


class PushFailed(RuntimeError):
    """The Hub failed or refused, or somebody else pushed first; the branch is whole. The command line exits with 1."""
