"""`hub_server` against the client it is made for: what `huggingface_hub` does at the Hub, it does here."""

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
from hub_server import LFS_SIZE, HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

try:
    import httpx2 as httpx  # since huggingface_hub 2.0
except ImportError:
    import httpx

REPO = "me/model"
WEIGHTS = random.Random(0).randbytes(3_000_000)
CARD = "---\ntags:\n- difffit\nbase_model: me/base\nlibrary_name: peft\n---\n# A model\n"
RETRIES = 5


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # the client asks huggingface.co who runs it
    with HubServer() as hub:
        yield hub


@pytest.fixture
def api(hub) -> HfApi:
    """Of the user `me`, who has a repo with a card, a config, and weights in a folder."""
    api = HfApi(endpoint=hub.endpoint, token=hub.add_user("me"))
    api.create_repo(REPO)
    contents = {"README.md": CARD.encode(), "config.json": b"{}", "unet/model.safetensors": WEIGHTS}
    api.create_commit(REPO, [CommitOperationAdd(path, data) for path, data in contents.items()], commit_message="First")
    hub.requests.clear()
    return api


@pytest.fixture
def download(hub, api, tmp_path):
    def download(filename: str = "unet/model.safetensors", **kwargs) -> str:
        where = {"endpoint": hub.endpoint, "token": api.token, "cache_dir": tmp_path / "cache"}
        return hf_hub_download(REPO, filename, **(where | kwargs))

    return download


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that the client would have slept before it tried again."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def log(hub: HubServer, part: str) -> list[tuple[str, int]]:
    return [(request.method, request.status) for request in hub.requests if part in request.path]


def anonymous(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=False)


# What it serves


def test_repos(hub):
    api = HfApi(endpoint=hub.endpoint, token=hub.add_user("me"))
    assert api.whoami()["name"] == "me" and api.whoami()["auth"]["accessToken"]["role"] == "write"
    url = api.create_repo("model")
    assert url == f"{hub.endpoint}/{REPO}" and url.repo_id == REPO and url.repo_type == "model"
    assert api.create_repo(REPO, exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        api.create_repo(REPO)
    assert error.value.response.status_code == 409
    assert api.list_repo_files(REPO) == [".gitattributes"]
    assert api.create_repo("set", repo_type="dataset") == f"{hub.endpoint}/datasets/me/set"
    api.upload_file(path_or_fileobj=b"a,b", path_in_repo="a.csv", repo_id="me/set", repo_type="dataset")
    assert api.file_exists("me/set", "a.csv", repo_type="dataset") and not api.repo_exists("me/set")
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO) and api.repo_exists("me/set", repo_type="dataset")
    api.delete_repo(REPO, missing_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO)


def test_info(api):
    info = api.model_info(REPO, files_metadata=True)
    assert (info.id, info.author, info.private, info.gated, info.library_name) == (REPO, "me", False, False, "peft")
    assert info.tags == info.card_data.tags == ["difffit"] and info.card_data.base_model == "me/base"
    assert info.sha == api.list_repo_commits(REPO)[0].commit_id
    files = {sibling.rfilename: sibling for sibling in info.siblings}
    assert list(files) == [".gitattributes", "README.md", "config.json", "unet/model.safetensors"]
    assert files["config.json"].size == 2 and files["config.json"].lfs is None
    assert files["unet/model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()


def test_listing(api):
    assert api.list_repo_files(REPO) == [".gitattributes", "README.md", "config.json", "unet/model.safetensors"]
    assert [entry.path for entry in api.list_repo_tree(REPO)] == [".gitattributes", "README.md", "config.json", "unet"]
    (weights,) = api.list_repo_tree(REPO, "unet")
    assert (weights.path, weights.size) == ("unet/model.safetensors", len(WEIGHTS))
    config, folder = api.get_paths_info(REPO, ["config.json", "unet", "absent"])
    assert config.blob_id == hashlib.sha1(b"blob 2\0{}").hexdigest() and folder.path == "unet"
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "absent"))


def test_bytes_come_back_and_large_files_go_by_lfs(hub, api, download, tmp_path):
    large = {"by_name.pt": b"text", "by bytes/ü.png": b"\x89PNG\0", "by_size.txt": b"-" * (LFS_SIZE + 1)}
    contents = large | {"text.txt": b"text", "empty.bin": b""}
    for name, data in contents.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "folder")
    assert log(hub, "/lfs/") == [("POST", 200)] + 3 * [("PUT", 200)]
    assert {name: read(download(name)) for name in contents} == contents and read(download()) == WEIGHTS
    entries = api.get_paths_info(REPO, list(contents))
    assert {entry.path for entry in entries if entry.lfs} == set(large)


def test_metadata_of_a_file(hub, api):
    commit = api.model_info(REPO).sha
    etags = {"config.json": hashlib.sha1(b"blob 2\0{}"), "unet/model.safetensors": hashlib.sha256(WEIGHTS)}
    for name, etag in etags.items():
        url = hf_hub_url(REPO, name, endpoint=hub.endpoint)
        metadata = get_hf_file_metadata(url, token=api.token)
        assert (metadata.commit_hash, metadata.etag) == (commit, etag.hexdigest())
    assert metadata.size == len(WEIGHTS) == int(httpx.head(url).headers["X-Linked-Size"])
    assert api.file_exists(REPO, "config.json") and not api.file_exists(REPO, "absent")
    assert api.file_exists(REPO, "config.json", revision=commit)
    assert not api.file_exists(REPO, "config.json", revision="absent")


def test_commits_stay_and_refs_move(hub, api, download):
    first = api.model_info(REPO).sha
    second = api.upload_file(path_or_fileobj=b"[1]", path_in_repo="config.json", repo_id=REPO).oid
    assert first != second == api.model_info(REPO).sha and len(second) == 40
    api.create_branch(REPO, branch="old", revision=first)
    api.create_tag(REPO, tag="v1/rc", revision="old")
    third = api.delete_file("config.json", REPO, revision="old", commit_message="Less", commit_description="Not needed")
    assert not api.file_exists(REPO, "config.json", revision="old")
    for revision, content in {first: b"{}", second: b"[1]", "main": b"[1]", "v1/rc": b"{}"}.items():
        assert read(download("config.json", revision=revision)) == content
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "old": third.oid}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1/rc": first}
    history = api.list_repo_commits(REPO, revision="old")
    assert [commit.title for commit in history] == ["Less", "First", "initial commit"]
    assert history[0].message == "Not needed" and history[1].commit_id == first
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(REPO, branch="old")
    api.create_branch(REPO, branch="old", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="default branch"):
        api.delete_branch(REPO, branch="main")
    api.delete_branch(REPO, branch="old")
    api.delete_tag(REPO, tag="v1/rc")
    for call in (api.model_info, api.list_repo_files, api.list_repo_commits):
        with pytest.raises(RevisionNotFoundError):
            call(REPO, revision="old")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id=REPO, revision="absent")
    assert api.revision_exists(REPO, first) and not api.revision_exists(REPO, "v1/rc")


def test_a_commit_is_whole_or_not_at_all(hub, api):
    before = api.model_info(REPO).sha
    wrong = [CommitOperationAdd("new", b"new"), CommitOperationDelete("absent")]
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, wrong, commit_message="Wrong")
    assert api.model_info(REPO).sha == before and not api.file_exists(REPO, "new")
    api.create_commit(REPO, [CommitOperationDelete("unet/")], commit_message="Less", parent_commit=before)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit(REPO, [CommitOperationDelete("config.json")], commit_message="Less", parent_commit=before)
    assert api.list_repo_files(REPO) == [".gitattributes", "README.md", "config.json"]


def test_what_has_not_changed_is_not_sent(hub, api):
    before = api.model_info(REPO).sha
    same = [CommitOperationAdd("unet/model.safetensors", WEIGHTS), CommitOperationAdd("config.json", b"{}")]
    assert api.create_commit(REPO, same, commit_message="Same").oid == before
    assert ("PUT", 200) not in log(hub, "/lfs/") and log(hub, "/commit/") == []


def test_pull_request(hub, api):
    before = api.model_info(REPO).sha
    for number in (1, 2):
        pull = api.upload_file(path_or_fileobj=b"new", path_in_repo="new", repo_id=REPO, create_pr=True)
        assert (pull.pr_num, pull.pr_revision) == (number, f"refs/pr/{number}")
    api.upload_file(path_or_fileobj=b"", path_in_repo="newer", repo_id=REPO, revision="refs/pr/1")
    assert [api.file_exists(REPO, "newer", revision=f"refs/pr/{number}") for number in (1, 2)] == [True, False]
    assert api.model_info(REPO).sha == before and not api.file_exists(REPO, "new")


def test_snapshot(hub, api, tmp_path):
    where = {"endpoint": hub.endpoint, "token": api.token, "cache_dir": tmp_path}
    folder = snapshot_download(REPO, allow_patterns=["*.json", "*.safetensors"], **where)
    assert read(f"{folder}/unet/model.safetensors") == WEIGHTS and sorted(os.listdir(folder)) == ["config.json", "unet"]
    assert os.path.basename(folder) == api.model_info(REPO).sha
    assert os.listdir(snapshot_download(REPO, allow_patterns="README.md", **where)) != []
    hub.requests.clear()
    assert snapshot_download(REPO, allow_patterns=["*.json", "*.safetensors"], **where) == folder
    assert log(hub, "/resolve/") == []


def test_large_files_are_checked(hub, api):
    oid, headers = hashlib.sha256(b"right").hexdigest(), {"Authorization": f"Bearer {api.token}"}

    def commit() -> int:
        file = {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 5}
        lines = [{"key": "header", "value": {"summary": "Large"}}, {"key": "lfsFile", "value": file}]
        content = "\n".join(json.dumps(line) for line in lines)
        url = f"{hub.endpoint}/api/models/{REPO}/commit/main"
        return httpx.post(url, content=content, headers=headers).status_code

    batch = {"operation": "upload", "objects": [{"oid": oid, "size": 5}]}
    answer = httpx.post(f"{hub.endpoint}/{REPO}.git/info/lfs/objects/batch", json=batch, headers=headers).json()
    assert answer["transfer"] == "basic"
    url = answer["objects"][0]["actions"]["upload"]["href"]
    for data in (b"wrong", b"right, but too long"):
        assert httpx.put(url, content=data).status_code == commit() == 400
    assert httpx.put(f"{hub.endpoint}/lfs/0/{oid}", content=b"right").status_code == 403
    assert not api.file_exists(REPO, "a.bin")
    assert httpx.put(url, content=b"right").status_code == commit() == 200
    assert api.file_exists(REPO, "a.bin")


# Who may


def test_private_and_tokens(hub, api):
    other = HfApi(endpoint=hub.endpoint, token=hub.add_user("other"))
    reader = HfApi(endpoint=hub.endpoint, token=hub.add_user("me", write=False))
    stranger = HfApi(endpoint=hub.endpoint, token="hf_testunknown")
    nobody = anonymous(hub)

    def status(call, *args, **kwargs) -> tuple[int, type]:
        with pytest.raises(HfHubHTTPError) as error:
            call(*args, **kwargs)
        return error.value.response.status_code, error.type

    new = {"path_or_fileobj": b"new", "path_in_repo": "new", "repo_id": REPO}
    assert nobody.model_info(REPO).id == other.model_info(REPO).id == REPO
    assert status(nobody.upload_file, **new) == (401, RepositoryNotFoundError)
    assert status(other.upload_file, **new) == status(reader.upload_file, **new) == (403, HfHubHTTPError)
    assert status(other.delete_repo, REPO) == status(reader.create_repo, "me/b") == (403, HfHubHTTPError)
    assert status(other.create_repo, "me/b") == (403, HfHubHTTPError)
    assert status(nobody.create_repo, "me/b") == (401, HfHubHTTPError)
    assert status(stranger.model_info, REPO) == status(stranger.whoami) == (401, HfHubHTTPError)
    assert status(nobody.model_info, "me/absent") == (401, RepositoryNotFoundError)
    assert status(other.model_info, "me/absent") == (404, RepositoryNotFoundError)
    api.update_repo_settings(REPO, private=True)
    assert api.model_info(REPO).private and reader.model_info(REPO).private
    for call in (nobody.model_info, nobody.list_repo_files):
        assert status(call, REPO) == (401, RepositoryNotFoundError)
    for call in (other.model_info, other.list_repo_files, other.delete_repo):
        assert status(call, REPO) == (404, RepositoryNotFoundError)
    assert not other.file_exists(REPO, "config.json") and reader.file_exists(REPO, "config.json")
    assert api.repo_exists(REPO) and not nobody.repo_exists(REPO)
    api.create_repo("me/closed", private=True)
    assert not other.repo_exists("me/closed") and not api.file_exists(REPO, "new")


def test_gated(hub, api, download):
    api.update_repo_settings(REPO, gated="manual")
    assert anonymous(hub).model_info(REPO).gated == "manual"
    for token in (False, hub.add_user("other")):
        with pytest.raises(GatedRepoError):
            download(token=token)
    assert read(download()) == WEIGHTS


# The cache


def test_etag_spares_the_second_download(hub, api, download):
    path = download()
    hub.requests.clear()
    assert download() == path and log(hub, "") == [("HEAD", 200)]
    api.upload_file(path_or_fileobj=WEIGHTS[::-1], path_in_repo="unet/model.safetensors", repo_id=REPO)
    assert read(download()) == WEIGHTS[::-1] and read(path) == WEIGHTS
    hub.requests.clear()
    commit = api.list_repo_commits(REPO)[1].commit_id
    assert download(revision=commit) == path and log(hub, "/resolve/") == []


def test_a_closed_hub_is_away(hub, api, download):
    path = download("config.json")
    hub.close()
    with pytest.raises(httpx.ConnectError):
        api.whoami()
    assert download("config.json") == path == download("config.json", local_files_only=True)
    with pytest.raises(LocalEntryNotFoundError):
        download("README.md", local_files_only=True)


# Failures


@pytest.mark.parametrize("chunk, status", [(2**16, 206), (constants.DOWNLOAD_CHUNK_SIZE, 200)])
def test_a_cut_download_goes_on_after_the_last_whole_chunk(hub, download, waits, monkeypatch, chunk, status):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", chunk)  # the client's own is more than the file
    hub.fail("GET", r"/resolve/.*safetensors", cut="response", times=2)
    assert read(download()) == WEIGHTS
    assert log(hub, "/resolve/") == [("HEAD", 200), ("GET", 0), ("GET", 0), ("GET", status)] and waits == [1, 1]


def test_ranges(hub, api):
    url = hf_hub_url(REPO, "unet/model.safetensors", endpoint=hub.endpoint)
    ranges = {"bytes=0-9": WEIGHTS[:10], "bytes=2999990-": WEIGHTS[-10:], "bytes=-7": WEIGHTS[-7:]}
    for asked, expected in ranges.items():
        response = httpx.get(url, headers={"Range": asked})
        assert (response.status_code, response.content) == (206, expected)
        first = WEIGHTS.index(expected)
        assert response.headers["Content-Range"] == f"bytes {first}-{first + len(expected) - 1}/{len(WEIGHTS)}"
    response = httpx.get(url, headers={"Range": "bytes=3000000-"})
    assert (response.status_code, response.headers["Content-Range"]) == (416, "bytes */3000000")


@pytest.mark.parametrize(
    "failure, expected", [({"status": 500}, HfHubHTTPError), ({"cut": "response"}, httpx.TransportError)]
)
def test_a_download_that_fails_leaves_nothing(hub, download, waits, tmp_path, failure, expected):
    hub.fail("GET", r"/resolve/", times=1 + RETRIES, **failure)
    with pytest.raises(expected):
        download()
    assert waits == ([1] * RETRIES if "cut" in failure else [])
    with pytest.raises(LocalEntryNotFoundError):
        download(local_files_only=True)
    assert not list(tmp_path.rglob("*/blobs/*"))
    hub.recover()
    assert read(download()) == WEIGHTS


@pytest.mark.parametrize("cut", ["request", "response"])
def test_a_cut_upload_is_sent_again(hub, api, download, waits, cut):
    hub.fail("PUT", r"/lfs/", cut=cut)
    api.upload_file(path_or_fileobj=WEIGHTS[1:], path_in_repo="new.bin", repo_id=REPO)
    assert log(hub, "/lfs/") == [("POST", 200), ("PUT", 0), ("PUT", 200)] and waits == [1]
    assert read(download("new.bin")) == WEIGHTS[1:]


def test_an_upload_cut_for_good_leaves_nothing(hub, api, download, waits):
    def upload() -> None:
        additions = [CommitOperationAdd("new.txt", b"text"), CommitOperationAdd("new.bin", WEIGHTS[1:])]
        api.create_commit(REPO, additions, commit_message="New")

    before = api.model_info(REPO).sha
    hub.fail("PUT", r"/lfs/", cut="request", times=1 + RETRIES)
    with pytest.raises(RuntimeError, match="Error while uploading") as error:
        upload()
    assert isinstance(error.value.__cause__, httpx.TransportError) and waits == [1, 2, 4, 8, 8]
    assert api.model_info(REPO).sha == before and not api.file_exists(REPO, "new.txt")
    upload()
    assert read(download("new.bin")) == WEIGHTS[1:] and read(download("new.txt")) == b"text"


@pytest.mark.parametrize("cut, done", [("request", False), ("response", True)])
def test_a_cut_commit_is_not_sent_again(hub, api, waits, cut, done):
    hub.fail("POST", r"/commit/main", cut=cut)
    with pytest.raises(httpx.TransportError):
        api.upload_file(path_or_fileobj=b"new", path_in_repo="new", repo_id=REPO)
    assert log(hub, "/commit/") == [("POST", 0)] and not waits
    assert api.file_exists(REPO, "new") == done


def test_half_a_commit_is_none(hub, api):
    lines = [{"key": "header", "value": {"summary": "Half"}}, {"key": "file", "value": {"path": "new", "content": ""}}]
    body = "\n".join(json.dumps(line) for line in lines)
    head = f"POST /api/models/{REPO}/commit/main HTTP/1.1\r\nAuthorization: Bearer {api.token}"
    with socket.create_connection(("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))) as client:
        client.sendall(f"{head}\r\nContent-Length: {len(body) + 1}\r\n\r\n{body}".encode())
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert log(hub, "/commit/") == [("POST", 0)] and not api.file_exists(REPO, "new")


@pytest.mark.parametrize("status", [401, 403, 404, 409, 429, 500, 503])
def test_what_a_status_raises(hub, api, download, waits, status):
    def failing(call, method: str, pattern: str, expected: type) -> Exception:
        hub.fail(method, pattern, status=status, times=1 + 1 + RETRIES)
        with pytest.raises(expected) as error:
            call()
        assert error.type is expected
        hub.recover()
        return error.value

    def upload() -> None:
        api.upload_file(path_or_fileobj=b"new", path_in_repo="new", repo_id=REPO)

    retried = status in (429, 500, 503)
    assert failing(lambda: api.model_info(REPO), "GET", "/api/models/", HfHubHTTPError).response.status_code == status
    failing(lambda: api.create_repo("me/b"), "POST", "/create", HfHubHTTPError)
    failing(upload, "POST", "/commit/", HfHubHTTPError)
    assert not waits and not api.file_exists(REPO, "new")
    failing(upload, "POST", "/preupload/", HfHubHTTPError)
    assert waits == ([1, 2, 4, 8, 8] if retried else [])
    waits.clear()
    error = failing(download, "HEAD", "/resolve/", HfHubHTTPError if status == 401 else LocalEntryNotFoundError)
    assert waits == ([1, 2, 4, 8, 8] if retried else [])
    assert (error if status == 401 else error.__cause__).response.status_code == status
    waits.clear()
    failing(download, "GET", "/resolve/", HfHubHTTPError)
    assert waits == ([1, 2, 4, 8, 8] if status == 429 else [])
    path = download()
    hub.fail("HEAD", "/resolve/", status=status)
    assert download() == path


@pytest.mark.parametrize(
    "headers, expected",
    [
        ({}, [1]),
        ({"Retry-After": "0"}, [1]),
        ({"Retry-After": "3"}, [4]),
        ({"RateLimit": '"api";r=0;t=7', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, [8]),
    ],
)
def test_the_client_waits_as_told(hub, api, waits, headers, expected):
    hub.fail("POST", "/preupload/", status=429, headers=headers)
    api.upload_file(path_or_fileobj=b"new", path_in_repo="new", repo_id=REPO)
    assert waits == expected and log(hub, "/preupload/") == [("POST", 429), ("POST", 200)]


def test_error_codes_and_late_answers(hub, api, download):
    hub.fail("HEAD", "/resolve/", status=403, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(GatedRepoError):
        download()
    hub.requests.clear()
    hub.fail("HEAD", "/resolve/", delay=5)  # longer than the client waits, and than the test
    assert read(download(etag_timeout=0.1)) == WEIGHTS and log(hub, "") == [("HEAD", 200), ("GET", 200)]
    hub.fail("GET", "/api/models", delay=0.05)
    start = time.perf_counter()
    assert api.repo_exists(REPO) and time.perf_counter() - start >= 0.05


def test_failures_that_make_no_sense_are_refused(hub, api):
    for wrong in (
        {},
        {"status": 200},
        {"status": 500, "cut": "request"},
        {"cut": "half"},
        {"delay": 60},
        {"status": 500, "times": 0},
        {"cut": "request", "headers": {"Retry-After": "1"}},
    ):
        with pytest.raises(ValueError, match="="):
            hub.fail("GET", "/", **wrong)
    assert api.repo_exists(REPO)
    with pytest.raises(HfHubHTTPError, match="501"):
        next(api.get_repo_discussions(REPO))


# Another process


def run(hub: HubServer, home: os.PathLike, code: str) -> None:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.add_user("me"), "HF_HOME": str(home)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | environment, check=True)


def test_a_child_process_needs_only_the_environment(hub, tmp_path):
    code = """
import pytest
from huggingface_hub import ModelCard, create_repo, hf_hub_download, repo_exists, upload_file

create_repo("me/model")
card = "---\\ntags: [difffit]\\n---\\n# A model"
upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="me/model")
assert ModelCard.load("me/model").data.tags == ["difffit"]
with pytest.raises(ValueError, match="tags"):
    upload_file(path_or_fileobj=card.replace("difffit", "3").encode(), path_in_repo="README.md", repo_id="me/model")
assert open(hf_hub_download("me/model", "README.md")).read() == card
assert not repo_exists("me/absent")
"""
    run(hub, tmp_path, code)
    assert log(hub, "/api/validate-yaml") == [("POST", 200), ("POST", 400)]
    assert {request.status for request in hub.requests} == {200, 400, 404}


@pytest.mark.skipif(int(version("huggingface_hub").split(".")[0]) < 2, reason="1.x checks cards at huggingface.co")
def test_a_card_is_pushed(hub, tmp_path):
    code = """
import pytest
from huggingface_hub import ModelCard, create_repo

create_repo("me/model")
card = ModelCard("---\\ntags: [difffit]\\n---\\n# A model")
card.push_to_hub("me/model")
card.data.base_model = "not a model"
with pytest.raises(ValueError, match="base_model"):
    card.push_to_hub("me/model")
"""
    run(hub, tmp_path, code)
    assert log(hub, "/api/validate-yaml") == [("POST", 200), ("POST", 200), ("POST", 400)]
