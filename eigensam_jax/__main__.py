"""`python -m eigensam_jax` is the `eigensam` command."""

import sys

from eigensam_jax.experiments import cli

if __name__ == "__main__":
    sys.exit(cli.main())
