"""Benchmarks as resumable runs: a manifest of images to make, then images, scores and a report in one folder."""
