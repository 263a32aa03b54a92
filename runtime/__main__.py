"""`python -m moevlm.runtime`: the moevlm command, where its script is not on the PATH."""

import sys

from moevlm.runtime.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
