"""`eigensam bench`: what a training step costs, by optimizer."""
