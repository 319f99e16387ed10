"""Training: a pure step, the published recipe, and a loop that resumes to the same numbers."""
