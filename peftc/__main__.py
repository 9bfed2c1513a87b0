"""`python -m peftc`: the `peftc` command where no script is installed."""

import sys

from peftc.cli import main

sys.exit(main())
