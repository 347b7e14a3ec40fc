"""Networks for images, and weights that they may begin from."""
