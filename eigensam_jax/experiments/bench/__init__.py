"""`eigensam bench`: what a training step costs, by each optimizer."""
