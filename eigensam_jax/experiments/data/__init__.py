"""Image data sets: where they come from and what is done to them."""
