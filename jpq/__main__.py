"""`python -m jpq`."""

import sys

from jpq.cli.main import main

sys.exit(main())
