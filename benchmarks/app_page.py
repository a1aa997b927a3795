"""Seconds until the app's page can be used, for a browser that has never seen it, beside an empty page of gradio:

    python benchmarks/app_page.py

Needs Chromium and the extra `app`; the small model that ships is loaded before the first visit is timed.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile

import gradio
from parts.arguments import parse
from parts.measure import now, ratio, report, spread, time_in_turns
from playwright.sync_api import sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
LOADING = 120  # seconds for the start of the app and its model
AIM = "<= 3 s"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def visit(browser, url, selector):
    """Open a page without anything in the browser's cache, up to where `selector` is there."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector(selector)
    context.close()


def wait_until_loaded(browser, url, app):
    page, end = browser.new_page(), now() + LOADING
    while app.poll() is None and now() < end:
        try:
            page.goto(url)
            page.wait_for_selector("text=Ready.", timeout=1000 * LOADING)
        except Exception as error:  # noqa: BLE001  it does not listen yet
            if "ERR_CONNECTION" not in str(error):
                raise
            page.wait_for_timeout(200)
        else:
            return page.close()
    sys.exit("The app did not start; kosmos-g app says why.")


def main():
    parser = argparse.ArgumentParser(description="Seconds until the page of kosmos-g app can be used.")
    parser.add_argument("--rounds", type=int, default=20, help="visits to each page (default: 20)")
    arguments = parse(parser)
    if CHROMIUM is None:
        print("Chromium is not installed: apt-get install chromium. Nothing was measured.")
        return
    with gradio.Blocks() as empty:
        gradio.Button("Run", elem_id="run")
    empty.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        command = [sys.executable, "-m", "kosmos_g_diffusers", "app", "--port", str(port), "--output", folder]
        app = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            url = f"http://127.0.0.1:{port}"
            wait_until_loaded(browser, url, app)
            pages = {
                "the app": lambda: visit(browser, url, "#run:enabled"),
                "the app, model's state told": lambda: visit(browser, url, "text=Ready."),
                "an empty page of gradio": lambda: visit(browser, empty.local_url, "#run:enabled"),
            }
            seconds = time_in_turns(pages, 2 if arguments.tiny else arguments.rounds)
        finally:
            app.terminate()
            app.wait()
            empty.close(verbose=False)
    plain = seconds["an empty page of gradio"]
    rows = [[name, spread(found), spread(ratio(found, plain)), AIM] for name, found in seconds.items()]
    rows[-1][-1] = ""
    columns = ["page", "seconds", "of an empty page", "aim"]
    report("Seconds until the page can be used", columns, rows, {"seconds": seconds}, arguments.json)


if __name__ == "__main__":
    main()
