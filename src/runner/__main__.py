"""``python -m runner``, and the script ``runner``."""

import sys

from runner import prelude


def main() -> int:
    """Import the command, which takes a moment, and run it; returns its exit code."""
    prelude.begin()
    from runner import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
