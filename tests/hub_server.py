"""A Hugging Face Hub on loopback, in memory, for tests: `huggingface_hub` talks to it unchanged, over real HTTP.

    with HubServer() as hub:
        token = hub.add_user("me")
        api = HfApi(endpoint=hub.endpoint, token=token)  # or HF_ENDPOINT=hub.endpoint in a child process
        api.create_repo("me/model")
        hub.fail("GET", r"/resolve/", status=503)        # the next matching request fails
        hub.fail("PUT", r"/lfs/", cut="request", times=2)
        hub.requests                                     # [Request("POST", "/api/repos/create", 200)]

It has users and tokens, private and gated repos, immutable commits, branches, tags, pull requests by `create_pr`, and
large files by the basic transfer of LFS, whose bytes are checked. What it does not know is answered 501.

It does not offer Xet. A client that has `hf_xet` uploads large files by Xet without asking the server, so set
HF_HUB_DISABLE_XET=1 (or `huggingface_hub.constants.HF_HUB_DISABLE_XET = True`); downloads need nothing. With
HF_HUB_DISABLE_TELEMETRY=1 the client asks for nothing but its work. Where this differs from the Hub: large files are
served in place and not by a redirect to a CDN, lists come in one page, there are no organisations, `.gitignore` is not
read, and `validate-yaml` makes a few of the Hub's checks.
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import json
import re
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

MAX_DELAY = 5.0  # seconds
LFS_SIZE = 10 * 1024**2  # bytes; what is larger is a large file, whatever its name
LFS_RULES = ["*.bin", "*.ckpt", "*.h5", "*.npy", "*.npz", "*.onnx", "*.pt", "*.pth", "*.safetensors", "*.zip"]


class Request(NamedTuple):
    """What came, its path percent-encoded and with its query, and the status answered: 0 if the connection was cut."""

    method: str
    path: str
    status: int


class HubServer:
    """A Hub that serves until `close`; `endpoint` is its URL, `requests` what was asked of it so far."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._tokens: dict[str, _Token] = {}
        self._repos: dict[tuple[str, str], _Repo] = {}  # by kind ("models") and id ("me/model")
        self._uploads: dict[str, tuple[_Repo, int]] = {}  # by ticket: where to, how many bytes
        self._failures: list[_Failure] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in list(self._server.connections):  # those that clients keep open
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_user(self, name: str, write: bool = True) -> str:
        """A new token of the user `name`, who need not be new; `write=False`: one that may only read."""
        token = f"hf_test{secrets.token_hex(15)}"
        self._tokens[token] = _Token(name, write)
        return token

    def fail(
        self,
        method: str,
        pattern: str,
        *,
        times: int = 1,
        status: int | None = None,
        headers: dict[str, str] | None = None,
        cut: str | None = None,
        delay: float = 0.0,
    ) -> None:
        """Makes the next `times` requests fail that have this method and `pattern`, a regex, somewhere in their path.

        The path is percent-encoded and has its query. Failures come in the order they were added, one to a request.

        Args:
            status: answered, with `headers` ("Retry-After", "X-Error-Code", ...); what was asked is not done.
            cut: "request" closes the connection when half of the request's body has come, and nothing is done;
                "response" does what was asked and closes it after half of the answer's body, or before an answer
                that has none.
            delay: seconds to wait first, at most 5. Alone it makes the answer late, no more.

        Raises:
            ValueError: a value that is not allowed, both a status and a cut, or no failure at all.
        """
        if (status is not None and cut is not None) or (status is None and cut is None and not delay):
            raise ValueError(f"status={status}, cut={cut}, delay={delay}: give a status, a cut or a delay.")
        if status is not None and not 400 <= status <= 599:
            raise ValueError(f"status={status}: a failure's status is 400 to 599.")
        if headers and status is None:
            raise ValueError(f"headers={headers}: they go with a status.")
        if cut not in (None, "request", "response"):
            raise ValueError(f'cut={cut!r}: allowed are "request" and "response".')
        if not 0 <= delay <= MAX_DELAY or times < 1:
            raise ValueError(f"delay={delay}, times={times}: a delay is 0 to {MAX_DELAY} seconds, times at least 1.")
        failure = _Failure(method, re.compile(pattern), status, headers or {}, cut, delay, times)
        with self._lock:
            self._failures.append(failure)

    def recover(self) -> None:
        """Forgets the failures that have not come yet."""
        with self._lock:
            self._failures.clear()

    def _next_failure(self, method: str, path: str) -> _Failure | None:
        with self._lock:
            for failure in self._failures:
                if failure.times and failure.method == method and failure.pattern.search(path):
                    failure.times -= 1
                    return failure
        return None

    def _answer(self, method: str, target: str, headers: Any, body: bytes) -> _Answer:
        """Does what is asked, one request at a time."""
        url = urlsplit(target)
        method = "GET" if method == "HEAD" else method
        found = ((route, route.pattern.fullmatch(url.path)) for route in _ROUTES if route.method == method)
        route, match = next((pair for pair in found if pair[1]), (None, None))
        try:
            if route is None:
                raise _Refusal(501, f"{method} {url.path} is not served by this test server")
            names = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            with self._lock:
                token = self._authenticate(headers.get("Authorization")) if route.access else None
                call = _Call(self, token, names, parse_qs(url.query), body, headers.get("Range"))
                if route.access in ("read", "write"):
                    call.repo = self._find(names.get("kind", "models"), names["id"], token, route.access == "write")
                return route.endpoint(call)
        except _Refusal as refusal:
            return refusal.answer

    def _authenticate(self, authorization: str | None) -> _Token | None:
        if authorization is None:
            return None
        token = self._tokens.get(authorization.removeprefix("Bearer "))
        if token is None:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return token

    def _find(self, kind: str, id_: str, token: _Token | None, write: bool) -> _Repo:
        """The repo, if this token may see it, and write to it if that is wanted."""
        repo = self._repos.get((kind, id_))
        owns = repo is not None and token is not None and token.user == repo.owner
        hidden = repo is None or (repo.private and not owns)
        if token is None and (hidden or write):
            # the Hub's 401 has no code: its client takes it for RepoNotFound, but at https endpoints only
            raise _Refusal(401, "Invalid username or password.", "RepoNotFound")
        if hidden:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        if write and not (owns and token.write):
            raise _Refusal(403, f"This token has no write access to {id_}")
        return repo


# What it holds


@dataclass(frozen=True)
class _Token:
    user: str
    write: bool


@dataclass
class _Failure:
    method: str
    pattern: re.Pattern
    status: int | None
    headers: dict[str, str]
    cut: str | None
    delay: float
    times: int  # left


@dataclass(frozen=True)
class _File:
    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class _Commit:
    oid: str
    parent: _Commit | None
    files: dict[str, _File]
    title: str
    message: str
    author: str
    date: str


@dataclass
class _Repo:
    kind: str
    id: str
    private: bool
    gated: str | bool = False
    blobs: dict[str, bytes] = field(default_factory=dict)  # large files that were uploaded, by sha256
    commits: dict[str, _Commit] = field(default_factory=dict)
    refs: dict[str, _Commit] = field(default_factory=dict)  # by full name: "refs/heads/main"

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def path(self) -> str:
        return f"/{self.id}" if self.kind == "models" else f"/{self.kind}/{self.id}"

    def at(self, revision: str) -> _Commit:
        """The commit that a branch, a tag, a full ref or a hash names."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.refs[ref]
        if revision not in self.commits:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[revision]

    def add(self, ref: str, parent: _Commit | None, files: dict, title: str, message: str, author: str) -> _Commit:
        """Makes a commit and moves `ref` to it."""
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        tree = sorted((path, file.blob_id) for path, file in files.items())
        content = json.dumps([len(self.commits), parent and parent.oid, tree, title, message, author, date])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.refs[ref] = self.commits[oid] = _Commit(oid, parent, files, title, message, author, date)
        return self.commits[oid]


# Endpoints


class _Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


class _Refusal(Exception):
    """Raised before anything was changed."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        about = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = _json({"error": message}, status, about | (headers or {}))


@dataclass
class _Call:
    hub: HubServer
    token: _Token | None
    names: dict[str, str]  # what the route's pattern captured
    query: dict[str, list[str]]
    body: bytes
    range: str | None
    repo: _Repo | None = None  # where the route has one

    @cached_property
    def json(self) -> Any:
        return json.loads(self.body)

    @cached_property
    def commit(self) -> _Commit:
        return self.repo.at(self.names.get("revision", "main"))


class _Route(NamedTuple):
    method: str
    pattern: re.Pattern
    access: str | None  # "read" or "write" to the repo in the path; "token": no repo; None: no token is looked at
    endpoint: Callable[[_Call], _Answer]


_ROUTES: list[_Route] = []
_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
_WEB = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+?)"


def _route(method: str, pattern: str, access: str | None):
    def register(endpoint: Callable[[_Call], _Answer]):
        _ROUTES.append(_Route(method, re.compile(pattern), access, endpoint))
        return endpoint

    return register


def _json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> _Answer:
    body = json.dumps(data, default=str).encode()  # a card may hold dates
    return _Answer(status, body, {"Content-Type": "application/json"} | (headers or {}))


@_route("GET", "/api/whoami-v2", "token")
def _whoami(call: _Call) -> _Answer:
    if call.token is None:
        raise _Refusal(401, "Invalid username or password.")
    name, role = call.token.user, "write" if call.token.write else "read"
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return _json({"type": "user", "name": name, "fullname": name, "orgs": [], "auth": auth})


@_route("POST", "/api/validate-yaml", "token")
def _validate_yaml(call: _Call) -> _Answer:
    errors, warnings = [], []
    try:
        data = _metadata(call.json["content"])
    except yaml.YAMLError as error:
        data = None
        errors.append(f"YAML metadata: {error}")
    if not errors and not data:
        warnings.append("empty or missing yaml metadata in repo card")
    elif not errors and not isinstance(data, dict):
        errors.append(f"YAML metadata must be a mapping, got {type(data).__name__}")
    elif not errors:
        bases = data.get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
                errors.append(f'"base_model" must be a repo id, got {base!r}')
        if not all(isinstance(tag, str) for tag in data.get("tags") or []):
            errors.append('"tags" must be an array of strings')
    told = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return _json(told, 400 if errors else 200)


def _metadata(card: str) -> Any:
    match = re.match(r"---\r?\n(.*?)\r?\n---\s", card, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


@_route("POST", "/api/repos/create", "token")
def _create_repo(call: _Call) -> _Answer:
    if call.token is None:
        raise _Refusal(401, "Invalid username or password.")
    kind, owner = _kind(call.json), call.json.get("organization") or call.token.user
    if owner != call.token.user or not call.token.write:
        raise _Refusal(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
    repo = _Repo(kind, f"{owner}/{call.json['name']}", _private(call.json))
    answer = {"id": repo.id, "name": repo.id, "url": call.hub.endpoint + repo.path}
    if (kind, repo.id) in call.hub._repos:
        return _json(answer | {"error": f"You already created this {kind[:-1]} repo"}, 409)
    rules = "".join(f"{rule} filter=lfs diff=lfs merge=lfs -text\n" for rule in LFS_RULES)
    repo.add("refs/heads/main", None, {".gitattributes": _File(rules.encode(), False)}, "initial commit", "", owner)
    call.hub._repos[kind, repo.id] = repo
    return _json(answer)


@_route("DELETE", "/api/repos/delete", "token")
def _delete_repo(call: _Call) -> _Answer:
    owner = call.json.get("organization") or (call.token.user if call.token else "")
    repo = call.hub._find(_kind(call.json), f"{owner}/{call.json['name']}", call.token, write=True)
    del call.hub._repos[repo.kind, repo.id]
    return _json({})


@_route("PUT", _API + "/settings", "write")
def _settings(call: _Call) -> _Answer:
    call.repo.gated = call.json.get("gated", call.repo.gated)
    if "visibility" in call.json or "private" in call.json:
        call.repo.private = _private(call.json)
    return _json({})


def _kind(asked: dict) -> str:
    return (asked.get("type") or "model") + "s"


def _private(asked: dict) -> bool:
    return asked.get("visibility") == "private" or bool(asked.get("private"))  # the newer name, the older one


@_route("GET", _API + "(?:/revision/(?P<revision>[^/]+))?", "read")
def _repo_info(call: _Call) -> _Answer:
    repo, commit = call.repo, call.commit
    readme = commit.files.get("README.md")
    card = (readme and _metadata(readme.data.decode())) or {}
    siblings = []
    for path, file in sorted(commit.files.items()):
        about = {"size": len(file.data), "blobId": file.blob_id, "lfs": _lfs(file)} if "blobs" in call.query else {}
        siblings.append({"rfilename": path} | about)
    info = {"id": repo.id, "modelId": repo.id, "author": repo.owner, "sha": commit.oid, "lastModified": commit.date}
    info |= {"createdAt": next(iter(repo.commits.values())).date, "private": repo.private, "gated": repo.gated}
    info |= {"disabled": False, "downloads": 0, "likes": 0, "tags": card.get("tags") or [], "siblings": siblings}
    info |= {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
    return _json(info | ({"cardData": card} if card else {}))


@_route("GET", _API + "/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "read")
def _tree(call: _Call) -> _Answer:
    files, folder = call.commit.files, call.names.get("path", "")
    prefix = f"{folder}/" if folder else ""
    inside = [path for path in _paths(files) if path.startswith(prefix)]
    if not inside and folder:
        raise _Refusal(404, f"{folder} does not exist on {call.names['revision']}", "EntryNotFound")
    if call.query.get("recursive") != ["true"]:
        inside = [path for path in inside if "/" not in path.removeprefix(prefix)]
    return _json([_entry(files, path) for path in inside])


@_route("POST", _API + "/paths-info/(?P<revision>[^/]+)", "read")
def _paths_info(call: _Call) -> _Answer:
    files = call.commit.files
    known = set(_paths(files))
    return _json([_entry(files, path) for path in parse_qs(call.body.decode())["paths"] if path in known])


def _paths(files: dict[str, _File]) -> list[str]:
    """Every file and folder."""
    return sorted(set(files) | {path[: slash.start()] for path in files for slash in re.finditer("/", path)})


def _entry(files: dict[str, _File], path: str) -> dict:
    if path in files:
        file = files[path]
        lfs = {"lfs": _lfs(file)} if file.lfs else {}
        return {"type": "file", "oid": file.blob_id, "size": len(file.data), "path": path} | lfs
    content = sorted((name, file.blob_id) for name, file in files.items() if name.startswith(f"{path}/"))
    return {"type": "directory", "oid": hashlib.sha1(repr(content).encode()).hexdigest(), "size": 0, "path": path}


def _lfs(file: _File) -> dict | None:
    about = {"oid": file.sha256, "sha256": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
    return about if file.lfs else None


@_route("GET", _WEB + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "read")
def _resolve(call: _Call) -> _Answer:
    if call.repo.gated and (call.token is None or call.token.user != call.repo.owner):
        message = f"Access to {call.repo.kind[:-1]} {call.repo.id} is restricted."
        raise _Refusal(403 if call.token else 401, message, "GatedRepo")
    headers = {"X-Repo-Commit": call.commit.oid}
    file = call.commit.files.get(call.names["path"])
    if file is None:
        raise _Refusal(404, "Entry not found", "EntryNotFound", headers)
    size = len(file.data)
    headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(size)}
    span = re.fullmatch(r"bytes=(\d*)-(\d*)", call.range or "")
    if span is None:
        return _Answer(200, file.data, headers)
    first, last = span.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise _Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return _Answer(206, file.data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})


@_route("GET", _API + "/refs", "read")
def _refs(call: _Call) -> _Answer:
    def under(prefix: str) -> list[dict]:
        refs = [(ref, commit.oid) for ref, commit in call.repo.refs.items() if ref.startswith(prefix)]
        return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid} for ref, oid in refs]

    refs = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": []}
    return _json(refs | {"pullRequests": under("refs/pr/")})


@_route("GET", _API + "/commits/(?P<revision>[^/]+)", "read")
def _commits(call: _Call) -> _Answer:
    history, commit = [], call.commit
    while commit is not None:
        about = {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date}
        history.append(about | {"authors": [{"user": commit.author}]})
        commit = commit.parent
    return _json(history)


@_route("POST", _API + "/branch/(?P<branch>[^/]+)", "write")
def _create_branch(call: _Call) -> _Answer:
    return _create_ref(call.repo, f"refs/heads/{call.names['branch']}", call.json.get("startingPoint", "main"))


@_route("POST", _API + "/tag/(?P<revision>[^/]+)", "write")
def _create_tag(call: _Call) -> _Answer:
    return _create_ref(call.repo, f"refs/tags/{call.json['tag']}", call.names["revision"])


def _create_ref(repo: _Repo, ref: str, revision: str) -> _Answer:
    commit = repo.at(revision)
    if ref in repo.refs:
        raise _Refusal(409, f"Reference already exists: {ref}")
    repo.refs[ref] = commit
    return _json({})


@_route("DELETE", _API + "/(?P<what>branch|tag)/(?P<name>[^/]+)", "write")
def _delete_ref(call: _Call) -> _Answer:
    ref = f"refs/{'heads' if call.names['what'] == 'branch' else 'tags'}/{call.names['name']}"
    if ref not in call.repo.refs:
        raise _Refusal(404, f"Invalid rev id: {ref}", "RevisionNotFound")
    if ref == "refs/heads/main":
        raise _Refusal(403, "The default branch cannot be deleted")
    del call.repo.refs[ref]
    return _json({})


@_route("POST", _API + "/preupload/(?P<revision>[^/]+)", "write")
def _preupload(call: _Call) -> _Answer:
    files = call.commit.files
    attributes = files[".gitattributes"].data.decode() if ".gitattributes" in files else ""
    rules = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    modes = []
    for asked in call.json["files"]:
        path = asked["path"]
        named = any(fnmatch.fnmatch(path, rule) or fnmatch.fnmatch(path, f"*/{rule}") for rule in rules)
        large = named or asked["size"] > LFS_SIZE or b"\0" in base64.b64decode(asked["sample"])
        present = {"oid": files[path].etag} if path in files else {}  # lets the client skip what has not changed
        modes.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} | present)
    return _json({"files": modes})


@_route("POST", _WEB + r"\.git/info/lfs/objects/batch", "write")
def _lfs_batch(call: _Call) -> _Answer:
    objects = []
    for asked in call.json["objects"]:
        answer = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in call.repo.blobs:
            ticket = secrets.token_hex(16)
            call.hub._uploads[ticket] = (call.repo, asked["size"])
            answer["actions"] = {"upload": {"href": f"{call.hub.endpoint}/lfs/{ticket}/{asked['oid']}"}}
        objects.append(answer)
    return _json({"transfer": "basic", "objects": objects})


@_route("PUT", "/lfs/(?P<ticket>[^/]+)/(?P<oid>[^/]+)", None)
def _lfs_upload(call: _Call) -> _Answer:
    if call.names["ticket"] not in call.hub._uploads:
        raise _Refusal(403, "This upload was not asked for")
    repo, size = call.hub._uploads[call.names["ticket"]]
    if len(call.body) != size or hashlib.sha256(call.body).hexdigest() != call.names["oid"]:
        raise _Refusal(400, f"The {len(call.body)} bytes that came are not the file of {size} bytes that was announced")
    repo.blobs[call.names["oid"]] = call.body
    return _json({})


@_route("POST", _API + "/commit/(?P<revision>[^/]+)", "write")
def _create_commit(call: _Call) -> _Answer:
    repo, revision = call.repo, call.names["revision"]
    ref = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}"
    head = repo.at(ref)
    header, *operations = [json.loads(line) for line in call.body.splitlines()]
    about = header["value"]
    if about.get("parentCommit", head.oid) != head.oid:
        raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for operation in operations:
        _apply(repo, files, operation["key"], operation["value"])
    answer, url = {}, call.hub.endpoint + repo.path
    if "create_pr" in call.query:
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        ref, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{url}/discussions/{number}"}
    commit = repo.add(ref, head, files, about["summary"], about.get("description", ""), call.token.user)
    return _json(answer | {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"})


def _apply(repo: _Repo, files: dict[str, _File], key: str, value: dict) -> None:
    path = value["path"]
    if key == "file":
        files[path] = _File(base64.b64decode(value["content"]), False)
    elif key == "lfsFile":
        if value["oid"] not in repo.blobs:
            raise _Refusal(400, f"{path} points to a large file that was not uploaded: {value['oid']}")
        files[path] = _File(repo.blobs[value["oid"]], True)
    elif key in ("deletedFile", "deletedFolder"):
        gone = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(path))]
        if not gone:
            raise _Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise _Refusal(400, f"Unknown operation: {key}")


# HTTP


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, hub: HubServer):
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        with contextlib.suppress(ConnectionError):  # the client left
            super().finish()

    def _serve(self) -> None:
        status = 0
        with contextlib.suppress(ConnectionError):
            status = self._respond()
        self.close_connection |= not status

    do_HEAD = do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _respond(self) -> int:
        """Returns the status answered, 0 if the connection is to be cut."""
        hub, failure = self.server.hub, self.server.hub._next_failure(self.command, self.path)
        size = int(self.headers.get("Content-Length", 0))
        cut = failure.cut if failure else None
        if failure:
            hub._closing.wait(failure.delay)
        if cut == "request":
            self.rfile.read(size // 2)
            return self._log(0)
        body = self.rfile.read(size)
        if len(body) != size:
            return self._log(0)
        if failure and failure.status:
            answer = _Refusal(failure.status, "This failure was asked for", headers=failure.headers).answer
        else:
            answer = hub._answer(self.command, self.path, self.headers, body)
        content = b"" if self.command == "HEAD" else answer.body
        status = self._log(0 if cut else answer.status)
        if content or not cut:
            self.send_response(answer.status)
            for name, value in (answer.headers | {"Content-Length": str(len(answer.body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut else content)
        return status

    def _log(self, status: int) -> int:
        self.server.hub.requests.append(Request(self.command, self.path, status))
        return status

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr: `HubServer.requests` is the log."""
