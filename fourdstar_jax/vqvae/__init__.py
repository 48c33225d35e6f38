"""The 4D VQ-VAE: from tokens of an object's views to Gaussians that move."""
