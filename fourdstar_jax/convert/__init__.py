"""Reads the weights that others released and turns them into ours."""
