"""An image of a run of the sprite bench: a row for each sort of prompt, what was given and what was drawn.

    kosmos-g evaluate sprites --kind own-drawings --output runs/drawings
    python examples/sprites/show_run.py runs/drawings --kind own-drawings --output drawings.png

Images that the reader found right have a green frame, the others a red one.
"""

import argparse
import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from kosmos_g_diffusers.evaluation.images import image_path
from kosmos_g_diffusers.evaluation.manifest import OWN_PICTURES, Manifest
from kosmos_g_diffusers.provenance import save_image

SIDE, GAP, TITLE = 64, 6, 150  # pixels
RIGHT, WRONG = "seagreen", "crimson"
MEASURE = {"own-drawings": "shape and colour", "typed-words": "all named"}


def draw_sheet(run, kind, columns):
    """The sheet, of the first `columns` prompts of each sort."""
    manifest, scores = Manifest.read(run), {}
    for line in (Path(run) / "scores" / "reader.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        scores[entry.get("id")] = entry.get("scores")
    rows = {}
    for task in manifest.tasks:
        if task.truth["kind"] == kind:
            rows.setdefault(task.row.rpartition(": ")[2], []).append(task)
    cell = (1 + max(len(task.pictures) for tasks in rows.values() for task in tasks)) * SIDE + 2 * GAP
    sheet = Image.new("RGB", (TITLE + columns * cell, len(rows) * (SIDE + 2 * GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (row, tasks) in enumerate(rows.items()):
        top = GAP + number * (SIDE + 2 * GAP)
        title = row if tasks[0].pictures else f"{row}: {tasks[0].prompt}"
        draw.text((GAP, top + SIDE // 2), textwrap.fill(title, 26), "black", anchor="lm", font_size=11)
        for column, task in enumerate(tasks[:columns]):
            left = TITLE + column * cell
            for path in task.pictures:
                with Image.open(Path(run) / OWN_PICTURES / path) as image:
                    sheet.paste(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE)), (left, top))
                left += SIDE + GAP
            with Image.open(image_path(run, task)) as image:
                sheet.paste(image, (left, top))
            colour = RIGHT if scores[task.id][f"{kind}.{MEASURE[kind]}"] else WRONG
            draw.rectangle((left - 2, top - 2, left + SIDE + 1, top + SIDE + 1), outline=colour, width=2)
    return sheet


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="results folder of kosmos-g evaluate sprites")
    parser.add_argument("--kind", choices=MEASURE, required=True)
    parser.add_argument("--columns", type=int, default=6, help="prompts of each sort (default: 6)")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args()
    sheet = draw_sheet(arguments.run, arguments.kind, arguments.columns)
    save_image(sheet, arguments.output, composite=True)  # it shows the reference images as well
    print(arguments.output)


if __name__ == "__main__":
    main()
