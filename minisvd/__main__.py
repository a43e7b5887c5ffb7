"""`python -m minisvd`: the command line, where its script is not on the path."""

import sys

from minisvd.cli import main

sys.exit(main())
