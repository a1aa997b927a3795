"""What reading training data costs: opening it, the first batch, memory, samples a second, and batches by length over many processes:

    python benchmarks/data.py

Writes 10^3 to 10^6 small captioned images as TSV and as shards, and reads them with the package, with a plain torch loader (TSV) and with
webdataset (shards), each in a process of its own, in turns. Seconds are CPU seconds of one process, so that other work on the machine
matters little. A sample is decoded and cropped to a tensor of 64 x 64 in all ways.
"""

import argparse
import base64
import io
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import webdataset

from kosmos_g_diffusers.data import MixtureDataset, build_source
from kosmos_g_diffusers.data.lengths import Lengths
from kosmos_g_diffusers.data.mixture import EndlessOrder
from kosmos_g_diffusers.data.shard_writer import pack_index, write_shard

SIZES = (1_000, 10_000, 100_000, 1_000_000)
PROCESSES = (1, 8, 64, 256)
BATCH, BUCKET, SHARD = 16, 8, 1000
READ = 640  # samples of which the rate is taken
WAYS = ("package, TSV", "torch, TSV", "package, shards", "webdataset, shards")


def write_data(folder, count):
    """The same images and captions again and again: what matters is how many there are."""
    rng = np.random.default_rng(0)
    texts = ["a dog " * int(number) for number in rng.integers(1, 30, SHARD)]
    files = []
    for _ in range(SHARD):
        buffer = io.BytesIO()
        PIL.Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((64, 64)).save(
            buffer, "JPEG"
        )
        files.append(buffer.getvalue())
    rows = "".join(
        f"x\t{text}\t{base64.b64encode(file).decode()}\n" for text, file in zip(texts, files, strict=True)
    ).encode()
    with open(folder / "all.tsv", "wb") as tsv:
        for _ in range(count // SHARD):
            tsv.write(rows)

    members = [
        (f"{number:06d}", {"json": json.dumps({"caption": text}).encode(), "jpg": file})
        for number, (text, file) in enumerate(zip(texts, files, strict=True))
    ]
    write_shard(folder / "000000.tar", members)
    for number in range(1, count // SHARD):
        shutil.copyfile(folder / "000000.tar", folder / f"{number:06d}.tar")
    listed = [{"url": f"{number:06d}.tar", "nsamples": SHARD} for number in range(count // SHARD)]
    (folder / "shards.json").write_bytes(pack_index(listed))


def as_tensor(image):
    return torch.from_numpy(np.asarray(image.convert("RGB").resize((64, 64)), dtype=np.float32))


class Collate:
    def prepare(self, sample, generator):
        return {"target": as_tensor(sample.target), "caption": sample.caption}

    def __call__(self, rows):
        return {"target": torch.stack([row["target"] for row in rows])}


def package_batches(line, cache, processes=1, bucket=1):

    source = build_source(line, cache_dir=cache)
    options = {
        "batch_size": BATCH,
        "num_processes": processes,
        "process_index": processes // 2,
        "bucket_window": bucket,
    }
    dataset = MixtureDataset([source], Collate(), **options)
    return (dataset[step] for step in range(10**9))


def torch_batches(path):
    """A list of all rows, as loaders are written when nobody thinks of size."""
    rows = Path(path).read_bytes().splitlines()

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            _, caption, image = rows[index].split(b"\t")
            return as_tensor(PIL.Image.open(io.BytesIO(base64.b64decode(image)))), caption.decode()

    return iter(torch.utils.data.DataLoader(Rows(), BATCH, shuffle=True))


def webdataset_batches(pattern):
    shards = (
        webdataset.WebDataset(pattern, shardshuffle=100).shuffle(1000).decode("pil").to_tuple("jpg", "json")
    )
    return iter(shards.map_tuple(as_tensor, lambda record: record["caption"]).batched(BATCH))


def anonymous_memory():
    """Bytes of this process that are not of files."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


def measure(way, folder, cache, processes, bucket):
    """CPU seconds to the first batch, samples a CPU second, memory: of this process."""
    before, start = anonymous_memory(), time.process_time()
    count = len(list(folder.glob("*.tar")))
    batches = {
        "package, TSV": lambda: package_batches(f"tsv:captions:{folder}/all.tsv", cache, processes, bucket),
        "package, shards": lambda: package_batches(f"shards:{folder}/*.tar", cache, processes, bucket),
        "torch, TSV": lambda: torch_batches(folder / "all.tsv"),
        "webdataset, shards": lambda: webdataset_batches(f"{folder}/{{000000..{count - 1:06d}}}.tar"),
    }[way]()
    next(batches)
    first = time.process_time() - start
    for _ in range(BUCKET - 1):  # a whole number of windows
        next(batches)
    start, steps = time.process_time(), READ // BATCH // BUCKET * BUCKET
    for _ in range(steps):
        next(batches)
    took = time.process_time() - start
    return {"first": first, "rate": steps * BATCH / took, "mib": (anonymous_memory() - before) / 1024**2}


def _send(pipe, *arguments):
    pipe.send(measure(*arguments))


def run_apart(way, folder, cache, processes=1, bucket=1):
    """`measure` in a process of its own, which begins with everything imported."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, way, folder, cache, processes, bucket))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def compare_ways(sizes, place):
    print("| samples | way | CPU s to the first batch, cold | warm | MiB | samples/CPU s |")
    print("|---|---|---|---|---|---|")
    for count in sizes:
        folder = place / str(count)
        folder.mkdir()
        write_data(folder, count)
        for way in WAYS:
            cold = run_apart(way, folder, place / f"cache-{count}")
            warm = run_apart(way, folder, place / f"cache-{count}")
            print(
                f"| {count:,} | {way} | {cold['first']:.2f} | {warm['first']:.2f} | {warm['mib']:.0f} | {warm['rate']:,.0f} |",
                flush=True,
            )
        if count != sizes[-1]:
            shutil.rmtree(folder)
    return place / str(sizes[-1]), place / f"cache-{sizes[-1]}"


def compare_processes(folder, cache, rounds):

    source = build_source(f"tsv:captions:{folder}/all.tsv", cache_dir=cache)
    start = time.process_time()
    Lengths(source, EndlessOrder(source.groups, 0)).build()
    print(f"\nlengths of {len(source):,} rows, once: {time.process_time() - start:.1f} CPU s\n")
    print("| processes | CPU time a sample, batches by length over without |")
    print("|---|---|")
    for processes in PROCESSES:
        ratios = []
        for _ in range(rounds):
            by_length = run_apart("package, TSV", folder, cache, processes, BUCKET)
            without = run_apart("package, TSV", folder, cache, processes, 1)
            ratios.append(without["rate"] / by_length["rate"])
        print(
            f"| {processes} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="10^3 samples alone, to see that it runs")
    parser.add_argument(
        "--rounds", type=int, default=3, help="pairs of which the median is taken (default: %(default)s)"
    )
    largest = "samples of the largest data set (default: %(default)s); the plain loader takes 2 GiB for 10^6"
    parser.add_argument("--largest", type=int, default=SIZES[-1], metavar="N", help=largest)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [size for size in SIZES if size <= (SIZES[0] if arguments.tiny else arguments.largest)]
    with tempfile.TemporaryDirectory() as place:
        folder, cache = compare_ways(sizes, Path(place))
        compare_processes(folder, cache, 1 if arguments.tiny else arguments.rounds)


if __name__ == "__main__":
    main()
