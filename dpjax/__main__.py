"""`python -m dpjax` is the console script `dpjax`."""

import sys

from dpjax.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
