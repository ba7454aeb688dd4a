"""`python -m gdn2gen`: the command line, also from a source tree that is not installed."""

from __future__ import annotations

import sys

from gdn2gen.cli.program import main

sys.exit(main())
