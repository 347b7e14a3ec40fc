"""`eigensam track`: how well each tracker follows the top eigenvector in training."""
