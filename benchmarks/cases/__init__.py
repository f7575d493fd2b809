"""The cases: each has a grid of points; at a point it checks every implementation, then times them in turns."""
