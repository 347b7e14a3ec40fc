"""`python -m eigensam_jax` is the `eigensam` command."""

from eigensam_jax.experiments import cli

if __name__ == "__main__":
    cli.command()
