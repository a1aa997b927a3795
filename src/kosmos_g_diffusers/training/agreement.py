"""What the processes of a run tell each other about a step's batches, so that together they compute what one would.

Two processes then learn what one learns from the doubled batch. Gradients are averaged over processes and over the
passes of a step, which is right for losses that are means over as many numbers everywhere; these two are not.
"""

import torch
from torch.nn import functional as F

from .stages import AlignStage


def agree_on_batches(batches, stage, accelerator):
    """Adjust a step's batches, in place, by what the other processes have.

    - Language modelling: labels are counted over the whole step, so that each weighs the same wherever it is read.
    - Alignment: the loss counts padded columns, so all processes pad to the longest prompt of any of them. It costs
      nothing where they wait for each other anyway.

    Args:
        batches: the dicts of this process's forward passes, on the accelerator's device.
        stage: the stage, which knows the id of padding.
        accelerator: accelerate.Accelerator.
    """
    labelled = [batch for batch in batches if "labels" in batch]  # the same passes in all processes
    if labelled:
        counts = [batch["labels"].ne(-100).sum() for batch in labelled]
        total = accelerator.reduce(torch.stack(counts).sum(), "sum").clamp(min=1)
        for batch in labelled:
            batch["n_labels"] = total / (accelerator.num_processes * len(labelled))
    elif isinstance(stage, AlignStage) and accelerator.num_processes > 1:
        lengths = [batch["input_ids"].shape[1] for batch in batches]
        longest = accelerator.gather(torch.tensor([lengths], device=accelerator.device)).amax(0)
        for batch, length in zip(batches, longest.tolist(), strict=True):
            columns = (0, length - batch["input_ids"].shape[1])
            pad = stage.text_encoder.config.text_config.pad_token_id
            batch["input_ids"] = F.pad(batch["input_ids"], columns, value=pad)
            for name in ("attention_mask", "image_token_mask"):
                if name in batch:
                    batch[name] = F.pad(batch[name], columns, value=False)
