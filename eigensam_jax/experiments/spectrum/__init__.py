"""`eigensam spectrum`: the Hessian's eigenvalues of a trained network."""
