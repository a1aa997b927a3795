"""From settings to images and files: what `kosmos-g generate` and the app draw with."""
