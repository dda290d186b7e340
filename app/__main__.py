"""``python -m app`` is the console command ``skip-softmax``."""

import sys

from app.cli import main

if __name__ == "__main__":
    sys.exit(main())
