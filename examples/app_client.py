"""Draw through a running app, from any program:

    kosmos-g app
    python examples/app_client.py http://127.0.0.1:7860

The small model that ships knows sprites alone. With kosmos-g app --model, give a photo and a prompt for it:

    python examples/app_client.py --image dog.jpg --prompt "<i> in the snow" --steps 30

A client needs gradio_client alone (pip install gradio_client), not this package. client.view_api() lists every endpoint
with its parameters; those that are not given here have the values that the page starts with.
"""

import argparse
import shutil
from pathlib import Path

from gradio_client import Client, handle_file

STAR = Path(__file__).parent / "images" / "star.png"


def main():
    parser = argparse.ArgumentParser(description="Draw through a running app.")
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:7860")
    parser.add_argument("--auth", help="USER:PASSWORD, if the app asks for them")
    parser.add_argument(
        "--output", type=Path, default=Path("out"), help="folder to write into (default: out)"
    )
    parser.add_argument("--image", default=STAR, metavar="FILE", help="what <i> stands for (default: a star)")
    parser.add_argument("--prompt", default="<i> on a mint background", help="with one <i>")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps (default: 12)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    auth = tuple(arguments.auth.split(":", 1)) if arguments.auth else None
    client = Client(arguments.url, auth=auth, verbose=False)

    # a run tells how far it is while it lasts; client.predict would wait for its end
    job = client.submit(
        prompt=arguments.prompt,
        pictures=[handle_file(arguments.image)],
        num_images=2,
        steps=arguments.steps,
        surprise=False,
        seed=1,
        api_name="/generate",
    )
    for _, _, progress in job:
        text = progress.partition("<div>")[2].partition("</div>")[0]
        print(text, end="\n" if text.startswith("Done") else "\r", flush=True)
    images, settings, _ = job.result()
    for image, entry in zip(images, settings, strict=True):
        path = arguments.output / f"app_seed_{entry['seed']}.png"
        shutil.copy(image["image"], path)  # the PNG with its settings, as the server keeps it
        print(path)

    # an image becomes a word of this client's session
    client.predict(name="mine", pictures=[handle_file(arguments.image)], api_name="/add_word")
    images, _, _ = client.predict(prompt="<mine>, pink", steps=arguments.steps, api_name="/generate")
    print("with an image word:", images[0]["caption"])


if __name__ == "__main__":
    main()
