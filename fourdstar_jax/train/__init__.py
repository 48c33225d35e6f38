"""Training of the stages, each one function from config to checkpoints, and what they share."""
