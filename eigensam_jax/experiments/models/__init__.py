"""Networks, and pretrained weights for one of them."""
