"""Time and memory of the operator, a layer, the model and training steps, beside PyTorch."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room too
