"""What several tests make their inputs with; `tests` is on the path of the test run."""
