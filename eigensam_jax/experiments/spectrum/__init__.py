"""`eigensam spectrum`: the eigenvalues of the Hessian of a trained network."""
