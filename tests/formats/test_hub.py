"""Hub names, against a server on this machine that speaks the part of the hub's API that a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch

from checkpoints import make_checkpoint
from roost import checkpoint
from roost.formats import hub, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"
SMALL = {"n_embd": 32, "head_size": 16, "vocab": 257, "shift_rank": 4, "decay_rank": 6}


class Hub(ThreadingHTTPServer):
    """Repositories in memory: {repo: {revision: {file: bytes}}}; `fetched` lists what was downloaded."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+)|/tree/([^/]+).*)?", path):
            repo, revision, tree = match[1], match[2] or match[3] or "main", match[3]
            files = self.find(repo, revision)
            if files is None:
                return
            if tree:
                rows = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                return self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
            commit = OLDER if revision in ("v1", OLDER) else COMMIT
            info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        assert match is not None, path
        files = self.find(match[1], match[2])
        if files is not None:
            content = files[match[3]]
            if self.command == "GET":
                self.server.fetched.append(match[3])
            self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=match[2])

    do_HEAD = do_GET

    def find(self, repo: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.server.repos.get(repo)
        files = (revisions or {}).get({COMMIT: "main", OLDER: "v1"}.get(revision, revision))
        if files is None:
            code = "RevisionNotFound" if revisions else "RepoNotFound"
            self.answer(404, b"{}", X_Error_Code=code, X_Error_Message="not found")
        return files


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as hub_server:
        thread = threading.Thread(target=hub_server.serve_forever, args=(0.05,))
        thread.start()
        yield hub_server
        hub_server.shutdown()
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    torch.save(make_checkpoint("6", **SMALL), tmp_path / "finch.pth")
    return tmp_path / "finch.pth"


def exported(folder: Path, seed: int) -> dict[str, bytes]:
    folder.mkdir()
    torch.save(make_checkpoint("5.2", n_embd=64, head_size=16, vocab=257, seed=seed), folder / "a.pth")
    return contents(checkpoint.convert(folder / "a.pth", folder / "hf"))


def test_a_repository(server: Hub, tmp_path: Path) -> None:
    main, older = exported(tmp_path / "1", 1), exported(tmp_path / "2", 2)
    extra = {"README.md": b"x", "pytorch_model.bin": b"unused", "onnx/model.safetensors": b"unused"}
    server.repos["owner/name-1.5B"] = {"main": {**main, **extra}, "v1": {**older, **extra}}
    cache = tmp_path / "cache"
    model, tokenizer = checkpoint.load("owner/name-1.5B", endpoint=server.url, cache_dir=cache)
    assert server.fetched == ["model.safetensors"]
    assert tokenizer is not None and tokenizer.vocab_size == 257
    assert model.fingerprint == checkpoint.load(tmp_path / "1/a.pth")[0].fingerprint
    old, _ = checkpoint.load("owner/name-1.5B@v1", endpoint=server.url, cache_dir=cache)
    assert old.fingerprint == checkpoint.load(tmp_path / "2/a.pth")[0].fingerprint
    again, _ = checkpoint.load("owner/name-1.5B", endpoint=server.url, cache_dir=cache)
    assert again.fingerprint == model.fingerprint and len(server.fetched) == 2


def test_the_name_of_a_published_model(server: Hub, tmp_path: Path) -> None:
    torch.save(make_checkpoint("6", n_embd=64, head_size=16, vocab=257), tmp_path / "a.pth")
    folder = checkpoint.convert(tmp_path / "a.pth", tmp_path / "hf")
    server.repos["RWKV/v6-Finch-1B6-HF"] = {"main": contents(folder)}
    model, _ = checkpoint.load("RWKV/v6-Finch-1B6-HF", endpoint=server.url, cache_dir=tmp_path / "cache")
    assert model.config.generation == "finch" and server.fetched == ["model.safetensors"]
    assert model.fingerprint == checkpoint.load(tmp_path / "a.pth")[0].fingerprint


def test_without_a_connection_the_cache_serves(server: Hub, tmp_path: Path, pth: Path) -> None:
    server.repos["owner/name"] = {"main": exported(tmp_path / "1", 1)}
    server.repos["owner/several"] = {"main": {"a.pth": pth.read_bytes(), "b.pth": b"?"}}
    cache = tmp_path / "cache"
    model, _ = checkpoint.load("owner/name", endpoint=server.url, cache_dir=cache)
    checkpoint.load("owner/several/a.pth", endpoint=server.url, cache_dir=cache)
    closed = "http://127.0.0.1:9"
    assert checkpoint.load("owner/name", endpoint=closed, cache_dir=cache)[0].fingerprint == model.fingerprint
    checkpoint.load("owner/several/a.pth", endpoint=closed, cache_dir=cache)
    with pytest.raises(ValueError, match=r"b\.pth is not in the cache"):
        checkpoint.load("owner/several/b.pth", endpoint=closed, cache_dir=cache)
    with pytest.raises(ValueError, match="owner/other is no file here, and the hub could not be asked"):
        checkpoint.load("owner/other", endpoint=closed, cache_dir=cache)


def test_shards_come_with_their_index(server: Hub, tmp_path: Path) -> None:
    weights = make_checkpoint("6", **SMALL)
    names, files = list(weights), [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    for n, file in enumerate(files):
        torch.save({name: weights[name] for name in names[n::2]}, tmp_path / file)
    table = {name: files[n % 2] for n, name in enumerate(names)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    server.repos["a/b"] = {"main": contents(tmp_path)}
    checkpoint.load("a/b", endpoint=server.url, cache_dir=tmp_path / "cache")
    assert sorted(server.fetched) == [*files, "pytorch_model.bin.index.json"]


def test_one_file_of_several(server: Hub, tmp_path: Path, pth: Path) -> None:
    server.repos["BlinkDL/rwkv"] = {"main": {"small.pth": pth.read_bytes(), "large.pth": b"?", "README.md": b""}}
    options = {"endpoint": server.url, "cache_dir": tmp_path / "cache"}
    model, _ = checkpoint.load("BlinkDL/rwkv/small.pth", **options)
    assert model.fingerprint == checkpoint.load(pth)[0].fingerprint and server.fetched == ["small.pth"]
    with pytest.raises(ValueError, match=r"e\.g\. BlinkDL/rwkv/large\.pth; there are large\.pth, small\.pth"):
        checkpoint.load("BlinkDL/rwkv", **options)
    with pytest.raises(ValueError, match=r"has no file medium\.pth; it has large\.pth, small\.pth"):
        checkpoint.load("BlinkDL/rwkv/medium.pth", **options)


def test_what_the_hub_does_not_have(server: Hub, tmp_path: Path) -> None:
    server.repos["owner/empty"] = {"main": {"README.md": b"nothing"}}
    options = {"endpoint": server.url, "cache_dir": tmp_path / "cache"}
    with pytest.raises(ValueError, match="owner/empty holds no weights"):
        checkpoint.load("owner/empty", **options)
    for name in ("owner/absent", "owner/empty@v7"):
        with pytest.raises(ValueError, match=f"{name} is no file here, and the hub") as refused:
            checkpoint.load(name, **options)
        assert "\n" not in str(refused.value)


def test_a_failed_download_is_one_line(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        raise OSError("the disk\nis full")

    server.repos["owner/name"] = {"main": {"a.pth": b""}}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="downloading owner/name failed: the disk is full"):
        checkpoint.load("owner/name", endpoint=server.url, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("RWKV/v6-Finch-1B6-HF", True),
        ("RWKV/v6-Finch-1B6-HF@main", True),
        ("a/b@refs/pr/1", True),
        ("BlinkDL/rwkv-6-world/RWKV-x060.pth", True),
        ("a/b@v1/c.safetensors", True),
        ("models/x.pth", False),
        ("here/models/x.pth", False),
        ("/models/x", False),
        ("../models", False),
        ("a/b/c", False),
        ("nestling", False),
        ("a b/c", False),
    ],
)
def test_hub_names_and_paths(name: str, meaning: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub.is_hub_id(name) is meaning


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nestlin", "the nearest model that ships is 'nestling'"),
        ("finch-1.6b", "names sizes, not weights"),
        ("", "neither a path nor"),
        ("a\0b", "neither a path nor"),
        ("finsh.pth", r"no such file: finsh\.pth; did you mean finch\.pth\?"),
        ("nowhere/model.pth", r"no such file: nowhere/model\.pth$"),
        ("/nowhere/model", "no such file: /nowhere/model"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str, pth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pth.parent)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(name)


@pytest.mark.parametrize("x", [None, 3, b"a.pth", ["a.pth"]])
def test_what_is_no_name_at_all(x: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{x!r} is a {type(x).__name__}: give a path or the name")):
        checkpoint.load(x)


def test_what_ships_and_what_shadows_it(tmp_path: Path, pth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "ASSETS", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"not in this installation \(nestling\.safetensors is missing\)"):
        checkpoint.load("nestling")
    checkpoint.convert(pth, tmp_path / "nestling.safetensors")
    assert checkpoint.load("nestling")[0].fingerprint == checkpoint.load(pth)[0].fingerprint
    torch.save(make_checkpoint("6", **SMALL, seed=5), tmp_path / "nestling")
    assert checkpoint.load("nestling")[0].fingerprint != checkpoint.load(pth)[0].fingerprint
