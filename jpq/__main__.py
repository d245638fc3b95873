"""`python -m jpq`."""

import sys

from jpq.cli import main

sys.exit(main())
