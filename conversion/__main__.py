"""`python -m conversion` is `sam-split`."""

import sys

from .cli import main

sys.exit(main())
