"""Training: losses, optimizers, the loop, and what is measured."""
