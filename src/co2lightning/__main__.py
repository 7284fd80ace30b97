"""`python -m co2lightning`."""

import sys

from co2lightning.cli import main

sys.exit(main())
