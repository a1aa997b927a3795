"""Kosmos-G as a model of lmms-eval, which runs the benchmarks of understanding: `lmms-eval --model kosmos_g ...`.

lmms-eval finds it by the entry point `lmms_eval.models` of this package; nothing else imports this file. See
docs/understanding.md.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from ..captioning import MAX_NEW_TOKENS, Answerer, as_text, load_answerer
from ..environment import as_dtype, default_dtype
from ..sprites.pretrained import SPRITES

IMAGE_TOKEN = "<image>"  # where a task puts an image among the words
TEMPLATE = "Question: {} Answer:"  # as Kosmos-1's paper asks (sec. 4.2)
SAMPLING = ("do_sample", "temperature", "top_p", "num_beams")  # options of a task that are transformers' too

MANIFEST = ModelManifest(model_id="kosmos_g", simple_class_path=f"{__name__}.KosmosGForLmms")


class KosmosGForLmms(lmms):
    """The model that tasks ask.

    Args:
        pretrained: folder or Hub id of a Kosmos-G pipeline; without it the small model that ships answers.
        template: of a prompt, `{}` stands for the task's question.
        dtype: of the weights; by the device without it.
        device: cpu, cuda, ...; each process takes its own under accelerate launch.
        batch_size: 1, the only one there is.
    """

    accelerator: Accelerator
    device: torch.device
    answer: Answerer
    template: str

    def __init__(
        self,
        pretrained: str | None = None,
        template: str = TEMPLATE,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
    ):
        super().__init__()
        if int(batch_size) != 1:
            raise ValueError(f"batch_size={batch_size} was given. Kosmos-G answers one at a time: pass 1.")
        if "{}" not in template:
            raise ValueError(f"The template {template!r} has no {{}} where the question goes.")
        self.accelerator = Accelerator(cpu=device == "cpu")
        self.device = self.accelerator.device
        if device is not None and self.accelerator.num_processes == 1:
            self.device = torch.device(device)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        dtype = as_dtype(dtype or default_dtype(self.device))
        self.answer = load_answerer(pretrained or SPRITES, dtype, self.device)
        self.template = template

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers of questions, as strings."""
        answers = []
        for request in tqdm(requests, desc="Kosmos-G answers", disable=self.rank != 0):
            context, given, doc_to_visual, doc_id, task, split = request.args
            # without sampling, tasks write a temperature of 0
            names = SAMPLING if given.get("do_sample") else ("num_beams",)
            options = {name: given[name] for name in names if given.get(name) is not None}
            options["max_new_tokens"] = given.get("max_new_tokens") or MAX_NEW_TOKENS
            text = self.answer(self._read(context, doc_to_visual, doc_id, task, split), **options)
            until = given.get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            answers.append(text)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        # lmms-eval 0.7.3 turns (loss, is greedy) into a string before it compares, so such tasks fail for every model
        raise NotImplementedError("Tasks that rate given answers are left out: take those that generate one.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("Tasks of several rounds are left out: Kosmos-G learnt no dialogues.")

    def _read(self, context, doc_to_visual, doc_id, task, split):
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        strange = [type(image).__name__ for image in images if not isinstance(image, Image.Image)]
        if strange:
            raise ValueError(f"The task {task} shows {strange[0]}; Kosmos-G reads images alone.")
        return arrange(self.template.replace("{}", context), images)


def arrange(text: str, images: Sequence[Any]) -> list[dict[str, Any]]:
    """Chat content: images where the text has `<image>`, or, if their numbers differ, in front of it."""
    stretches = text.split(IMAGE_TOKEN)
    if len(stretches) != len(images) + 1:
        stretches = [*[""] * len(images), " ".join(stretches)]
    content = []
    for index, stretch in enumerate(stretches):
        if index:
            content.append({"type": "image", "image": images[index - 1]})
        content.append({"type": "text", "text": as_text(stretch)})
    return content
