"""`eigensam sde`: SAM against its stochastic differential equations."""
