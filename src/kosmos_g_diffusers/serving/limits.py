"""What one run may ask for on a server; the command line has no such limits."""

LIMITS = {
    "num_images": (1, 8),
    "steps": (1, 250),  # as many as the paper's COCO figures take
    "guidance": (0, 30),
    "width": (8, 1024),
    "height": (8, 1024),
    "lora_scale": (-2, 2),
    "strength": (0, 1),
    "binding": (0, 10),
    "seed": (0, 2**53 - 1),  # beyond that a browser's numbers have gaps
}
MAX_PROMPT = 4_000  # characters
