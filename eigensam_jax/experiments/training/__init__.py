"""Training: losses, optimizers, the loop and the measurements."""
