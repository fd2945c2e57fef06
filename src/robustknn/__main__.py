"""`python -m robustknn`."""

import sys

from robustknn.cli import main

if __name__ == "__main__":
    sys.exit(main())
