"""``python -m rwfx.experiments``."""

import sys

from rwfx.experiments.cli import main

sys.exit(main())
