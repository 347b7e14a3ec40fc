"""What `sam`, `asam` and `eigen_sam` share; nothing here is public."""
