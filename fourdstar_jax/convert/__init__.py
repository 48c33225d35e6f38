"""Released PyTorch weights to ours and back, without PyTorch and without running what they hold."""
