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


def assert_refused(command, options, wrong, right, capsys, monkeypatch, tmp_path):
    """The error of `eigensam COMMAND OPTIONS` names what is wrong, and what is right.

    It runs in a folder with a file that `--out` may name.
    """
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    error = error_of([command, *options.split()], capsys)
    assert wrong in error
    assert right in error
