"""Numerical solvers that make training data: the equation in the docstring, one solver a file."""
