"""The Hugging Face Hub: fetch files of models into its cache, and upload a release as one commit.

A checkpoint is `OWNER/NAME`, a file `OWNER/NAME/FILE.gguf` or `OWNER/NAME:TYPE` (the file whose name ends with the
type, as in `llama-cli -hf`); `@REVISION` may stand behind NAME. A path that exists on this machine is never taken for
an id. Only data is fetched: safetensors, JSON, texts and GGUF files, no code and no pickles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.config import DEMO_MODEL
from so8t_core.errors import InputError
from verification.gguf.split_set import set_stem, shard_paths

CHECKPOINT = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*"]
TOKENIZER = ["*.json", "*.jinja", "*.model", "*.txt"]
_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(@(?P<revision>[\w.-]+))?"
    r"(:(?P<type>[\w-]+)|/(?P<file>[^:@]+\.gguf))?"
)


class HubId(NamedTuple):
    """A model on the hub, or one file of it."""

    repo: str
    revision: str | None
    file: str | None  # its path inside the repository
    type: str | None  # "Q4_K_M": the file whose name ends with it


def hub_id(given: str | Path) -> HubId | None:
    """The Hub id in a path; None where the path exists on this machine or cannot be an id."""
    path = Path(given)
    if path.exists() or path.is_absolute() or (len(path.parts) > 1 and Path(path.parts[0]).exists()):
        return None
    found = _ID.fullmatch(str(given))
    return HubId(found["repo"], found["revision"], found["file"], found["type"]) if found else None


def checkpoint(given: Path) -> Path:
    """A checkpoint's directory: the given directory, or for a Hub id the directory of the fetched files.

    Raises:
        InputError: the hub did not give the files.
    """
    found = hub_id(given)
    if found is None or found.file or found.type:
        return given
    return snapshot(found.repo, found.revision, CHECKPOINT, named=repr(str(given)))


def gguf_file(given: Path) -> Path:
    """A GGUF file: the given path, or for a Hub id the path of the fetched file (of a set of shards, the first).

    Raises:
        InputError: the hub did not give the file, or the id names a repository with several files.
    """
    found = hub_id(given)
    if found is None:
        return given
    from huggingface_hub import HfApi, hf_hub_download

    try:
        name = found.file
        if name is None:
            names = HfApi().list_repo_files(found.repo, revision=found.revision)
            name = _one_of([n for n in names if n.endswith(".gguf")], found, str(given))
        shards = [path.as_posix() for path in shard_paths(Path(name))]  # all shards of a set, or the one file
        first, *_ = [Path(hf_hub_download(found.repo, one, revision=found.revision)) for one in shards]
        return first
    except hub_errors() as error:
        what = f"{str(given)!r} is no file here and the hub did not give it"
        raise not_on_the_hub(what, error, "Check the id, log in with `hf auth login`, or give a file") from None


def _one_of(names: list[str], wanted: HubId, given: str) -> str:
    names = list(dict.fromkeys(shard_paths(Path(name))[0].as_posix() for name in names))
    fitting = [n for n in names if wanted.type is None or _type_of(n) == wanted.type.upper()]
    if len(fitting) == 1:
        return fitting[0]
    shown = ", ".join(sorted(names)[:8]) or "none"
    raise InputError(
        f"{given} fits {len(fitting)} GGUF files of {wanted.repo}, one is needed; its files: {shown}. "
        f"Name one as {wanted.repo}/FILE.gguf"
    )


def _type_of(name: str) -> str:
    """ "Q4_K_M" of "folder/my-model-Q4_K_M.gguf" or "my-model.Q4_K_M.gguf"."""
    return re.split(r"[-./]", set_stem(Path(name)))[-1].upper()


def snapshot(repo: str, revision: str | None, patterns: list[str], *, named: str) -> Path:
    """Fetch files of a repository; returns their directory.

    Args:
        patterns: glob patterns of the files.
        named: the id as the user gave it, for the message.

    Raises:
        InputError: the hub did not give the files.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except hub_errors() as error:
        way_out = f"Give a checkpoint directory, a hub id, or {DEMO_MODEL}; `hf auth login` opens private ones"
        raise not_on_the_hub(f"{named} is no directory here and the hub did not give it", error, way_out) from None


def check_repository(name: str) -> None:
    """Refuse a wrong repository name before any work is done for it.

    Raises:
        InputError: the name does not have the form OWNER/NAME.
    """
    found = _ID.fullmatch(name)
    if found is None or found["repo"] != name:
        raise InputError(f"--to {name} is no repository's name; write OWNER/NAME, as in my-name/my-model-GGUF")


def upload(folder: Path, repo: str, *, digests: Mapping[str, str], private: bool, message: str) -> str:
    """Upload everything in a folder as one commit; returns the commit's address.

    Args:
        digests: sha256 of the files that must arrive unchanged, by their path in the folder.
        private: make a new repository private.

    Raises:
        InputError: the hub refused, or afterwards holds other bytes under one of these names.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        added = [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files]
        commit = api.create_commit(repo, added, commit_message=message)
        stored = api.model_info(repo, revision=commit.oid, files_metadata=True).siblings or []
    except hub_errors() as error:
        way_out = "Check the name, and log in with `hf auth login` as someone who may write there"
        raise not_on_the_hub(f"the hub did not take the release as {repo!r}", error, way_out) from None
    there = {file.rfilename: file.lfs.sha256 for file in stored if file.lfs is not None}
    for name, digest in digests.items():
        if there.get(name) != digest:
            raise InputError(
                f"{repo} holds {name} with sha256 {there.get(name, 'unknown')}, verified was {digest}: it changed on "
                "the way. Delete that commit, and release again."
            )
    return str(commit.commit_url)


def hub_errors() -> tuple[type[Exception], ...]:
    """The errors of the hub's client when it cannot give the files of an id."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    client = HfHubHTTPError.__bases__[0]  # the error of the HTTP client that this version uses
    return (HFValidationError, HfHubHTTPError, client, OSError)  # OSError: a missing file, or no network


def not_on_the_hub(what: str, error: Exception, way_out: str) -> InputError:
    """The refusal of an id; `what` names the id and the fault."""
    said = str(error).strip()
    reason = " ".join((said.splitlines() or [type(error).__name__])[0].split())[:300]
    return InputError(f"{what} ({reason}). {way_out}")
