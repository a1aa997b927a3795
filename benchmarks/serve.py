"""Requests a second and the time of a request of `kosmos-g serve`, drawn together and one by one, with 1, 4 and 16 clients:

    python benchmarks/serve.py

Two services run, one with `--batch 1`; each round asks one after the other, so that a change in the machine's load meets
both. Every client asks for its next image when it has the last one. `--model` takes another model than the small one.
"""

import argparse
import base64
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from parts.arguments import parse
from parts.measure import report, spread

from kosmos_g_diffusers.sprites import HEART, STAR

LOADING = 600  # seconds for the start of a service and its model
TOGETHER, APART = "together", "one by one"
PROMPTS = ("<i> on a mint background", "<i> on a white background", "<i> and <i> on a white background")
AIMS = {1: "p50 no worse", 16: ">= 2.5"}


def data_url(path):
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


IMAGES = [data_url(STAR), data_url(HEART)]


class Service:
    """`kosmos-g serve` in a process of its own."""

    def __init__(self, batch, flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "kosmos_g_diffusers", "serve", "--port", str(self.port)]
        command += ["--batch", str(batch), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=LOADING)

    def wait(self):
        end = time.monotonic() + LOADING
        while self.process.poll() is None and time.monotonic() < end:
            try:
                connection = self.connect()
                connection.request("GET", "/ready")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        sys.exit("The service did not start; kosmos-g serve says why.")

    def cpu_seconds(self):
        """That it has computed so far, in all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def body(number, steps):
    prompt = PROMPTS[number % len(PROMPTS)]
    images = [IMAGES[(number + place) % 2] for place in range(prompt.count("<i>"))]
    asked = {"prompt": prompt, "images": images, "seed": number}
    return json.dumps(asked | ({"steps": steps} if steps else {}))


def ask(service, clients, requests, steps, first):
    """(seconds until all have their images, CPU seconds of the service, seconds of each request)."""
    seconds, started = [], threading.Barrier(clients + 1)

    def client(number):
        connection = service.connect()
        started.wait()
        for count in range(requests):
            content, begin = body(first + number + clients * count, steps), time.perf_counter()
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/images/generations", content, headers)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise RuntimeError(text.decode()[:200])
            seconds.append(time.perf_counter() - begin)

    threads = [threading.Thread(target=client, args=[number]) for number in range(clients)]
    for thread in threads:
        thread.start()
    used = service.cpu_seconds()
    started.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    if len(seconds) < clients * requests:
        sys.exit("A request failed.")
    return time.perf_counter() - begin, service.cpu_seconds() - used, seconds


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main():
    parser = argparse.ArgumentParser(description="Throughput and latency of kosmos-g serve.")
    parser.add_argument("--rounds", type=int, default=5, help="of each number of clients (default: 5)")
    parser.add_argument("--requests", type=int, default=4, help="of a client in a round (default: 4)")
    parser.add_argument("--batch", type=int, default=16, help="images that are drawn together (default: 16)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="(default: 1 4 16)")
    parser.add_argument("--model", help="Kosmos-G folder (default: the small model)")
    arguments = parse(parser)
    if arguments.cpu_time:
        parser.error("--cpu-time counts this process alone, and others draw; their CPU time is in the table.")
    rounds, requests, steps = arguments.rounds, arguments.requests, None
    if arguments.tiny:
        rounds, requests, steps = 1, 1, 1
    flags = ["--model", arguments.model] if arguments.model else []
    services = {TOGETHER: Service(arguments.batch, flags), APART: Service(1, flags)}
    found = {}
    try:
        for service in services.values():
            service.wait()
            ask(service, 1, 2, steps, 0)
        for clients in arguments.clients:
            for number in range(rounds):
                for name in reversed(services) if number % 2 else services:
                    count = requests * (4 if clients == 1 else 1)
                    asked = ask(services[name], clients, count, steps, 1000 * number)
                    found.setdefault((clients, name), []).append(asked)
    finally:
        for service in services.values():
            service.end()
    rows = []
    for (clients, name), asked in found.items():
        alone = found[clients, APART]
        rates = [len(seconds) / wall for wall, _, seconds in asked]
        # round by round, so that the load of the machine is the same
        more = [one / (len(two[2]) / two[0]) for one, two in zip(rates, alone, strict=True)]
        cpu = [used / len(seconds) for _, used, seconds in asked]
        of_all = [second for _, _, seconds in asked for second in seconds]
        rows.append(
            [
                clients,
                name,
                spread(rates),
                spread(more),
                f"{statistics.median(of_all):.2f}",
                f"{percentile(of_all, 0.95):.2f}",
                spread(cpu),
                "" if name == APART else AIMS.get(clients, ""),
            ]
        )
    columns = ["clients", "drawn", "requests/s", "of one by one", "p50 s", "p95 s", "CPU s a request", "aim"]
    values = {f"{clients} {name}": asked for (clients, name), asked in found.items()}
    report("Requests of a service", columns, rows, {"rounds": values}, arguments.json)


if __name__ == "__main__":
    main()
