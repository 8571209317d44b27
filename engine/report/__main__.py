"""``python -m engine.report``."""

from __future__ import annotations

import sys

from engine.cli import run
from engine.report import main

sys.exit(run(main))
