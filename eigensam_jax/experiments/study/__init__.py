"""Many runs of a network by a plan: `compare`, `accuracy`, `frontier`, `ablate`."""
