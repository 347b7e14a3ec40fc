"""What the `eigensam` command does with what it can't run."""

from eigensam_jax.experiments import cli


def error_of(arguments, capsys):
    """The one line with which the command ends, and all that it prints."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:  # how argparse leaves
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("eigensam")
    return captured.err
