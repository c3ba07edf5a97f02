"""Run a command of dev.py inside the prepared environment. A file, because -m puts the working folder on sys.path."""

import importlib
import sys

if __name__ == "__main__":
    try:
        sys.exit(importlib.import_module(f"devtools.{sys.argv[1]}").main(sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit(130)
