"""What the tests of composition share: pipelines from the components of another, and pictures to compare."""

import numpy as np
import torch


def borrow(cls, pipe, **parts):
    """A pipeline of `cls` with the components of `pipe`, as docs/composition.md says to make one."""
    other = cls.from_pipe(pipe, torch_dtype=pipe.dtype, **parts)
    other.set_progress_bar_config(disable=True)
    return other


def generate(pipe, prompt, **arguments):
    """Three steps from the same noise; the size is the pipeline's, or that of the pictures it is given."""
    settings = {
        "num_inference_steps": 3,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
    }
    return np.asarray(pipe(prompt, **settings | arguments)[0])


def assert_all_differ(*images):
    for index, image in enumerate(images):
        assert np.isfinite(image).all() and image.shape == images[0].shape
        for other in images[:index]:
            difference = np.abs(image - other).max()
            assert difference > 1e-3
