"""`python -m dpjax.train` is `dpjax train`."""

import sys

from dpjax.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
