"""Weights of a hub: from the cache, over loopback, and without anybody who answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from fedclip_secure.config.plan import OpenClipModel
from fedclip_secure.errors import ModelError
from fedclip_secure.features import download
from fedclip_secure.features.download import from_hub
from fedclip_secure.features.encoder import resolve

WEIGHTS = b"the weights"
NAMES = ["model.safetensors", "model.bin"]


class Hub(BaseHTTPRequestHandler):
    """A repository that has one of the two files, or also the first."""

    both = False

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if self._answer():
            self.wfile.write(WEIGHTS)

    def _answer(self) -> bool:
        named = [f"/someone/clip/resolve/main/{name}" for name in (NAMES if self.both else NAMES[1:])]
        there = self.path in named or "/resolve/" + "a" * 40 in self.path
        self.send_response(200 if there else 404)
        about = {"ETag": '"1234"', "Content-Length": str(len(WEIGHTS))} if there else {"Content-Length": "0"}
        code = {} if there else {"X-Error-Code": "EntryNotFound"}
        for name, value in {**about, **code, "X-Repo-Commit": "a" * 40}.items():
            self.send_header(name, value)
        self.end_headers()
        return there

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def set_hub(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """The hub is on loopback, and no proxy lies between."""
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    set_hub(monkeypatch, server.server_address[1])
    yield server
    server.shutdown()
    server.server_close()


def test_what_a_repository_has_is_downloaded_once_and_then_read_from_the_cache(
    cache: Path, hub: ThreadingHTTPServer
) -> None:
    path = from_hub("someone/clip", NAMES, "the weights")
    assert path.read_bytes() == WEIGHTS
    hub.shutdown()
    assert from_hub("someone/clip", NAMES, "the weights") == path


def test_a_later_file_of_the_cache_gives_way_to_the_first_of_the_repository(
    cache: Path, hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = from_hub("someone/clip", NAMES[1:], "the weights")
    monkeypatch.setattr(Hub, "both", True)
    first = from_hub("someone/clip", NAMES, "the weights")
    assert (later.name, first.name) == ("model.bin", "model.safetensors")


def test_a_later_file_of_the_cache_serves_where_nobody_answers(cache: Path, hub: ThreadingHTTPServer) -> None:
    later = from_hub("someone/clip", NAMES[1:], "the weights")
    hub.shutdown()
    hub.server_close()
    assert from_hub("someone/clip", NAMES, "the weights") == later


def test_a_hub_that_lacks_the_file_is_quoted(cache: Path, hub: ThreadingHTTPServer) -> None:
    with pytest.raises(
        ModelError, match=r"^the weights cannot be downloaded \(.*404.*resolve/main/gone\.bin would lie"
    ):
        from_hub("someone/clip", ["gone.safetensors", "gone.bin"], "the weights")


@pytest.mark.parametrize("name", ["../x", "a/b/c", "words folder", ""])
def test_what_is_no_name_of_a_repository_is_refused_and_asks_nobody(cache: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"^the weights: '.*' is no name of a repository of Hugging Face; name a copy"):
        from_hub(name, NAMES, "the weights")


def test_a_hub_that_never_answers_is_given_up_after_one_short_look(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        set_hub(monkeypatch, silent.getsockname()[1])
        with pytest.raises(ModelError, match=r"^the weights cannot be downloaded \(.*resolve/main/model\.safetensors"):
            from_hub("someone/clip", NAMES, "the weights")
        silent.settimeout(0)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_openais_weights_without_a_network_tell_address_place_and_remedy(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    set_hub(monkeypatch, port)
    with pytest.raises(ModelError) as refused:
        resolve(OpenClipModel(name="ViT-B-32-quickgelu", pretrained="openai"), tmp_path)
    said = str(refused.value)
    repository = "timm/vit_base_patch32_clip_224.openai"
    assert f"http://127.0.0.1:{port}/{repository}/resolve/main/open_clip_model.safetensors would lie in" in said
    assert str(cache / f"models--{repository.replace('/', '--')}") in said
    assert "name a copy of that file: `model.pretrained` in federation.yaml, `weights` in silo.yaml" in said
