"""GPU kernels (Pallas Triton): the operator in attention.py, the residual MLP in mlp.py."""
