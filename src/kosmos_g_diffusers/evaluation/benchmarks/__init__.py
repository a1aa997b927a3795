"""The benchmarks of `kosmos-g evaluate`, a module each."""
