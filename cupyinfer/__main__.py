"""``python -m cupyinfer`` and the ``cupyinfer`` command."""

import sys

from cupyinfer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
