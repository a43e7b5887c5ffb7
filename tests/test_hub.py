"""A hub id is one variant of the weights, downloaded once; whatever stands in the way is one sentence.

The hub is a server on this machine, spoken to by the hub's own client. The client reads where the hub is when it is
imported, so the two of it, one told to stay offline, are processes of their own, with one cache.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from checkpoint_files import small_modules, write_folder
from minisvd.folder import CONFIG_FILES, STEMS

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLAIN = [f"{stem}.safetensors" for stem in STEMS.values()]
FP16 = [f"{stem}.fp16.safetensors" for stem in STEMS.values()]
CONFIGS = {*CONFIG_FILES.values(), "generation_config.json"}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for: repositories are folders. `asked` lists all requests, `sent` files."""

    folder: Path
    asked: list[str]
    sent: list[str]
    hang: threading.Event

    def do_HEAD(self) -> None:
        self.respond(body_wanted=False)

    def do_GET(self) -> None:
        self.respond(body_wanted=True)

    def respond(self, body_wanted: bool) -> None:
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[0] == "api"
        if parts[-1].startswith("hangs") or (api and "hangs" in parts):
            self.hang.wait(60)
            return None
        owner, name, verb, revision, *rest = [*(parts[2:] if api else parts), "", "", "", ""]
        folder, file = self.folder / owner / name, "/".join(filter(None, rest))
        if owner == "status":
            return self.fail(int(name), "")
        if not folder.is_dir():
            return self.fail(401, "RepoNotFound")
        if revision not in ("main", COMMIT, ""):
            return self.fail(404, "RevisionNotFound")
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        if api and verb == "tree":  # a question for which the client sets no time limit, so nobody may ask it
            self.hang.wait(60)
            return None
        if "silent" in name and not api and (body_wanted or name == "silent"):
            self.hang.wait(60)
            return None
        if api:
            info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self.send(json.dumps(info).encode(), body_wanted)
        if name == "gated":
            return self.fail(403, "GatedRepo")
        if body_wanted:
            self.sent.append(file)
        if name == "cut" and body_wanted and file.endswith(".safetensors"):
            self.send_response(200)
            self.send_header("Content-Length", str((folder / file).stat().st_size))
            self.end_headers()
            self.wfile.write((folder / file).read_bytes()[:1000])
            return self.connection.shutdown(socket.SHUT_RDWR)
        return self.send((folder / file).read_bytes(), body_wanted)

    def send(self, body: bytes, body_wanted: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body_wanted:
            self.wfile.write(body)

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


CLIENT = """
import io, json, sys, time
from contextlib import redirect_stdout
from minisvd import checkpoint
from minisvd.checkpoint import load_unet, resolve
from minisvd.cli import main

checkpoint.TIMEOUT = 2
time.sleep = lambda _seconds: None  # in which the hub's client would wait between its tries
for line in sys.stdin:
    name, source, options = json.loads(line)
    try:
        if name == "load_unet":
            answer = sum(p.double().sum().item() for p in load_unet(source, **options).parameters())
        elif name == "account":
            with redirect_stdout(io.StringIO()) as out:
                status = main(["account", "--model", source, "--json"])
            answer = json.loads(out.getvalue()) if status == 0 else status
        else:
            found = resolve(source, **options)
            files = [file.relative_to(found.path).as_posix() for file in found.files.values()]
            answer = [*files, found.generation.steps]
    except (ValueError, OSError) as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process that answers calls with what was found, or with the error."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.home, self.errors = home, open(home / f"stderr-{environment['HF_HUB_OFFLINE']}", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1"} | environment,
        )

    def __call__(self, name: str, source: str, **options: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([name, source, options]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def cached(self) -> set[str]:
        """Every file of every repository in the cache."""
        snapshots = self.home.glob("hub/models--*/snapshots/*")
        return {p.relative_to(s).as_posix() for s in snapshots for p in s.rglob("*") if p.is_file()}

    def close(self) -> None:
        self.process.communicate()
        self.errors.close()


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One as the published ones are: both variants, and larger files of the same weights beside them."""
    folder, modules = tmp_path_factory.mktemp("hub"), small_modules()
    for variant in (None, "fp16"):
        write_folder(folder / "someone" / "svd", modules, variant)
    (folder / "someone/svd/generation_config.json").write_text('{"steps": 3}')
    for name in ("svd.safetensors", "svd_image_decoder.safetensors", "unet/diffusion_pytorch_model.bin", "README.md"):
        (folder / "someone/svd" / name).write_bytes(b"large")
    write_folder(folder / "someone" / "gated", modules)
    (folder / "someone/pickles").mkdir()
    for name in (*CONFIG_FILES.values(), *(f"{stem}.bin" for stem in STEMS.values())):
        (folder / "someone/pickles" / name).parent.mkdir(exist_ok=True)
        (folder / "someone/pickles" / name).write_text("{}")
    return folder


@pytest.fixture(scope="module")
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def clients(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Client]]:
    home = tmp_path_factory.mktemp("home")
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    both = [Client(home, **hub, HF_HUB_OFFLINE=offline) for offline in "01"]
    yield both[0], both[1]
    for client in both:
        client.close()


@pytest.fixture
def online(clients: tuple[Client, Client]) -> Client:
    """With nothing in the cache."""
    shutil.rmtree(clients[0].home / "hub", ignore_errors=True)
    return clients[0]


@pytest.fixture
def offline(clients: tuple[Client, Client]) -> Client:
    return clients[1]


@contextmanager
def serving(repositories: Path, port: int) -> Iterator[type[Hub]]:
    """The hub, while it can be reached."""
    handler = type("ThisHub", (Hub,), {"folder": repositories, "asked": [], "sent": [], "hang": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield handler
    finally:
        handler.hang.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_one_variant_is_downloaded_once_and_found_without_a_connection(
    repositories: Path, port: int, online: Client, offline: Client
) -> None:
    """Online; again, nothing new; then with the hub gone, by `offline`, and by HF_HUB_OFFLINE."""
    with serving(repositories, port) as hub:
        total = online("load_unet", "someone/svd")
        assert total == sum(p.double().sum().item() for p in small_modules()["unet"].parameters())
        assert online.cached() == set(hub.sent) == CONFIGS | {f"{STEMS['unet']}.safetensors"}, "one part alone"
        for revision in (None, "main", COMMIT):
            assert online("resolve", "someone/svd", revision=revision) == [*PLAIN, 3]
        assert online.cached() == set(hub.sent) == CONFIGS | {*PLAIN}
        assert len(hub.sent) == len(set(hub.sent)), "nothing twice"
        asked = len(hub.asked)
        assert offline("resolve", "someone/svd") == [*PLAIN, 3]
        assert online("resolve", "someone/svd", offline=True) == [*PLAIN, 3]
        assert len(hub.asked) == asked, "not even a question while offline"
    assert online("resolve", "someone/svd") == [*PLAIN, 3]
    for client in (online, offline):
        fp16 = client("resolve", "someone/svd", variant="fp16")
        assert "lacks unet/diffusion_pytorch_model.fp16.safetensors" in fp16
        other = client("resolve", "someone/else")
        assert other.startswith("FileNotFoundError: someone/else is not in the local cache: run once with http")


def test_account_downloads_the_configs_alone(repositories: Path, port: int, online: Client, offline: Client) -> None:
    """And counts the same with the hub gone; a repository that is not there is refused. Control: the load above."""
    with serving(repositories, port) as hub:
        report = online("account", "someone/svd")
        assert set(hub.sent) == online.cached() == CONFIGS
        assert online("account", "someone/else") == 2
    assert report["total"]["parameters"] == sum(p.numel() for p in small_modules()["unet"].parameters())
    assert report["run"]["guided"] + report["run"]["single"] == 3, "its own generation_config.json's steps"
    assert offline("account", "someone/svd") == report


def test_the_named_variant_and_no_other_is_downloaded(
    repositories: Path, port: int, online: Client, offline: Client
) -> None:
    """And found again when no variant is named. The control is the plain files of the test above."""
    with serving(repositories, port):
        assert online("resolve", "someone/svd", variant="fp16") == [*FP16, 3]
    assert online.cached() == CONFIGS | {*FP16}
    assert offline("resolve", "someone/svd") == [*FP16, 3]


def test_what_the_hub_refuses_is_one_sentence_that_says_what_to_do(
    repositories: Path, port: int, online: Client
) -> None:
    """And nothing is downloaded."""
    url, xt = f"http://127.0.0.1:{port}", "stabilityai/stable-video-diffusion-img2vid-xt-1-1"
    with serving(repositories, port) as hub:
        assert online("resolve", "someone/missing") == (
            f"ValueError: {url}/someone/missing does not exist or is private: check the name, or run `hf auth login`; "
            "if someone/missing is a path, there is nothing there"
        )
        assert online("resolve", "svd-xt-1-1") == (  # a preset is a hub id
            f"ValueError: {url}/{xt} does not exist or is private: check the name, or run `hf auth login`"
        )
        assert online("resolve", "someone/gated") == (
            f"ValueError: someone/gated is gated: accept its licence at {url}/someone/gated and run `hf auth login`"
        )
        assert online("resolve", "someone/svd", revision="v9") == (
            f"ValueError: someone/svd has no revision 'v9': see {url}/someone/svd/tree/main for those it has"
        )
        variant = online("resolve", "someone/svd", variant="bf16")
        assert variant.startswith("FileNotFoundError: someone/svd lacks unet/diffusion_pytorch_model.bf16.safetensors")
        pickles = online("resolve", "someone/pickles")
        assert pickles.startswith("ValueError: someone/pickles/unet/diffusion_pytorch_model.bin is a pickle, which can")
        assert "\n" not in variant + pickles
    assert not hub.sent
    assert not online.cached()


def test_a_hub_in_trouble_is_one_sentence_with_its_own_reason(repositories: Path, port: int, online: Client) -> None:
    """It refuses, is asked too often, or is broken: its status is named. One that never answers is not waited for."""
    with serving(repositories, port):
        for status, reason in ((403, "Forbidden"), (429, "Too Many Requests"), (500, "Internal Server Error")):
            answer = online("resolve", f"status/{status}")
            assert answer.startswith(f"FileNotFoundError: status/{status} is not in the local cache: run once with"), (
                answer
            )
            assert str(status) in answer
            assert reason in answer
        began = time.monotonic()
        answer = online("resolve", "hangs/svd")
        assert answer.startswith("FileNotFoundError: hangs/svd is not in the local cache")
        assert "imed out" in answer
        assert time.monotonic() - began < 40


@pytest.mark.parametrize("falls", ["silent", "silent-files"])
def test_a_hub_that_falls_silent_is_not_waited_for(repositories: Path, port: int, online: Client, falls: str) -> None:
    """After its list of files, or with the first file: one sentence. Control: the same files come from someone/svd, and
    once they are here, the list alone is asked for.
    """
    if not (repositories / "someone" / falls).is_dir():
        shutil.copytree(repositories / "someone/svd", repositories / "someone" / falls)
    with serving(repositories, port) as hub:
        began = time.monotonic()
        answer = online("resolve", f"someone/{falls}")
        seconds = time.monotonic() - began
        print(answer, seconds)
        assert answer.startswith(f"ConnectionError: someone/{falls} was not downloaded whole (ReadTimeout"), answer
        assert answer.endswith("): run again, what came is kept")
        assert "\n" not in answer
        assert seconds < 30
        assert online("resolve", "someone/svd") == [*PLAIN, 3]
        asked = len(hub.asked)
        assert online("resolve", "someone/svd") == [*PLAIN, 3]
        assert len(hub.asked) == asked + 1


def test_a_download_that_is_cut_is_one_sentence(repositories: Path, port: int, online: Client) -> None:
    """Every file of weights ends after 1,000 bytes. Whole, it loads: the tests above."""
    shutil.copytree(repositories / "someone/svd", repositories / "someone/cut")
    with serving(repositories, port):
        answer = online("load_unet", "someone/cut")
    assert answer.startswith("ConnectionError: someone/cut was not downloaded whole ("), answer
    assert answer.endswith("): run again, what came is kept")
    assert "\n" not in answer
