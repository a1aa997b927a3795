"""Images -> captions, by a captioner of transformers that needs no prompt: BLIP-2, BLIP."""

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


class Captioner:
    """Says what images show.

    Args:
        model: folder or Hub id, such as Salesforce/blip2-opt-2.7b.
        device, dtype: where and in what precision it runs.
        max_new_tokens: of a caption.

    Raises:
        OSError: the model cannot be loaded.
    """

    def __init__(self, model, *, device, dtype, max_new_tokens=32):
        self.processor = AutoProcessor.from_pretrained(model)
        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(device).eval()
        self.max_new_tokens = max_new_tokens

    @torch.no_grad()
    def __call__(self, images):
        """A caption, one line, for each of a list of RGB PIL images; the likeliest words, without chance."""
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device, self.model.dtype)
        ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
