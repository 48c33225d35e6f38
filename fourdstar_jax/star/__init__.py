"""STAR: the autoregressive model of an object's tokens, one timestep of all views at a time."""
