"""Pure functions on arrays; nothing here needs flax."""
