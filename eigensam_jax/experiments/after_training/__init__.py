"""What is done to trained weights, and which measure of sharpness foretells it."""
