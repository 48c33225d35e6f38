"""Evaluation of bundles on unseen clips: metrics, protocol, and the count model to beat."""
