"""Run the Python blocks of modular.md and keep the images that they draw in docs/modular/.

python docs/modular.py
"""

import contextlib
import re
import tempfile
from pathlib import Path

from PIL import Image

from kosmos_g_diffusers.provenance import save_image

PAGE = Path(__file__).with_name("modular.md")


def main():
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"(<!-- check -->\n)?```python\n(.*?)```", text, re.DOTALL)
    names, folder = {}, PAGE.with_suffix("")
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as drawn, contextlib.chdir(drawn):
        for mark, block in blocks:
            if not mark:
                exec(compile(block, str(PAGE), "exec"), names)
        for name in re.findall(r"\(modular/(\w+\.png)\)", text):
            image = Image.open(name)
            save_image(
                image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST), folder / name
            )


if __name__ == "__main__":
    main()
