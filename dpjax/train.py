"""`python -m dpjax.train` is `python -m dpjax.commands.train`."""

from dpjax.commands.train import run

if __name__ == "__main__":
    run()
