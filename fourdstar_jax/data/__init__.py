"""Data in numpy: animated GLB files posed and rendered, splits, batches, and users' videos."""
