"""Results files, checkpoints and terminal output of the commands."""
