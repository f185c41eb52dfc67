"""`python -m tritwise`."""

from tritwise.cli.app import run

if __name__ == "__main__":
    run()
