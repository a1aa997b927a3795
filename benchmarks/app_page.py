"""Seconds until the app's page can be used by a browser that has never seen it, compared with an empty page of gradio:

    python benchmarks/app_page.py

Needs Chromium and the extra `app`; the small model that ships is loaded before the first visit is timed.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import gradio
from parts.arguments import parse
from parts.measure import ratio, report, spread, time_in_turns
from playwright.sync_api import Error, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
LOADING = 120  # seconds for the start of the app and its model
AIM = "<= 3 s"
EMPTY = "an empty page of gradio"


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
    page, end = browser.new_page(), time.monotonic() + LOADING
    while app.poll() is None and time.monotonic() < end:
        try:
            page.goto(url)
            page.wait_for_selector("text=Ready.", timeout=1000 * LOADING)
        except Error as error:
            if "ERR_CONNECTION" not in str(error):
                raise
            # it does not listen yet
            page.wait_for_timeout(200)
        else:
            return page.close()
    sys.exit("The app did not start; kosmos-g app says why.")


def main():
    parser = argparse.ArgumentParser(description="Seconds until the page of kosmos-g app can be used.")
    parser.add_argument("--rounds", type=int, default=20, help="visits to each page (default: 20)")
    arguments = parse(parser)
    if arguments.cpu_time:
        parser.error("--cpu-time counts this process alone, and the page is made by others. Leave it out.")
    if CHROMIUM is None:
        print("Chromium is not installed: apt-get install chromium. Nothing was measured.")
        return
    with gradio.Blocks(analytics_enabled=False) as empty:
        gradio.Button("Run", elem_id="run")
    theme = gradio.themes.Soft(font=["system-ui"], font_mono=["monospace"])  # fetches no fonts, as the app's
    empty.launch(server_port=free_port(), theme=theme, prevent_thread_lock=True, quiet=True)
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
                EMPTY: lambda: visit(browser, empty.local_url, "#run:enabled"),
            }
            seconds = time_in_turns(pages, 2 if arguments.tiny else arguments.rounds)
        finally:
            app.terminate()
            app.wait()
            empty.close(verbose=False)
    rows = []
    for name, found in seconds.items():
        median, lowest, highest = ratio(found, seconds[EMPTY])
        aim = "" if name == EMPTY else AIM
        rows.append([name, spread(found), f"{median:.2f} ({lowest:.2f} to {highest:.2f})", aim])
    columns = ["page", "seconds", "of an empty page", "aim"]
    report("Seconds until the page can be used", columns, rows, {"seconds": seconds}, arguments.json)


if __name__ == "__main__":
    main()
