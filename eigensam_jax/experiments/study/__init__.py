"""`eigensam compare`, `accuracy` and `ablate`: many runs of one network, by a plan."""
