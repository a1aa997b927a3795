"""The page of `kosmos-g app`."""
