"""`python -m uhd_jax COMMAND` is `uhd-jax COMMAND`."""

import sys

from uhd_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
