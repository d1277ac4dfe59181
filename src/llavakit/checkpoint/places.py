"""Where the name of a model leads: a folder here, a model of this package, or a repository on the Hugging Face Hub.

    runs/finetune, ./my-model, /data/llava-7b     a folder; what exists here always wins
    tiny, tiny-next, tiny-hd                      the models inside this package
    llava-hf/llava-1.5-7b-hf                      owner/name on the Hub: fetched once (resumed after a break), then read from the cache

Nothing else is read out of a name: what kind of checkpoint it is, its files say (``store.load``).
"""

from __future__ import annotations

import errno
import re
from importlib import resources
from pathlib import Path

from llavakit.errors import CheckpointError

BUILT_IN = ("tiny", "tiny-next", "tiny-hd")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FILES = ("*.json", "*.jinja", "*.model", "*.txt")  # config, tokenizer, processor, chat template
_SAFE, _PICKLED = "*.safetensors", "*.bin"
_ELSEWHERE = "*/*"  # patterns match through folders, where others' formats and old checkpoints lie: never needed
_SNAPSHOTS = "snapshots"  # of the Hub's cache: models--owner--name/snapshots/COMMIT/
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def find(name: str | Path | None, *, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """The folder of a model; None is the built-in one. ``revision``: branch, tag or commit on the Hub.

    Raises CheckpointError: ``no_built_in_model``, and ``hub_not_found``, ``hub_gated``, ``hub_unreachable``, ``pickle_refused``,
    ``cannot_write``. A name that is none of the three is returned as it is, for the reader to say what is missing there.
    """
    if name is None:
        return built_in()
    if Path(name).exists():
        return Path(name)
    if str(name) in BUILT_IN:
        return built_in(str(name))
    if _REPOSITORY.fullmatch(str(name)) and not Path(name).parent.exists():
        return _fetched(str(name), revision, allow_pickle)
    return Path(name)


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the Hub's cache holds; None for any other folder."""
    return folder.name if folder.parent.name == _SNAPSHOTS and re.fullmatch("[0-9a-f]{40}", folder.name) else None


def built_in(name: str = "tiny") -> Path:
    """The folder of a model inside the installed package. Raises CheckpointError where it was left out."""
    folder = Path(str(resources.files("llavakit"))) / "weights" / name
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "the built-in model is not part of this installation",
            code="no_built_in_model",
            where=str(folder),
            remedy=f"name a checkpoint folder, or train it with runs/{'tiny' if name == 'tiny' else 'tiny-next'}.sh",
        )
    return folder


def _fetched(repository: str, revision: str | None, allow_pickle: bool) -> Path:
    """The snapshot of a repository. Weights that can run code are fetched only where there are no others, and only if allowed."""
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        wanted = [*_FILES, *patterns]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=[_ELSEWHERE]))

    where = repository if revision is None else f"{repository}@{revision}"
    try:
        folder = fetch(_SAFE)
        safe = any(folder.glob(_SAFE))
        if not safe and allow_pickle:
            folder = fetch(_PICKLED)
    except Exception as error:  # the HTTP library under the Hub's has changed before, and its errors reach us during a download
        raise _explained(error, repository, where) from error
    if not safe and not allow_pickle:
        what = "it has no safetensors; pickled weights can run code while they are read"
        raise CheckpointError(what, code="pickle_refused", where=where, remedy="--allow-pickle, if you trust its owner")
    return folder


def _explained(error: Exception, repository: str, where: str) -> CheckpointError:
    """What stood in the way of fetching, and what to do about it."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    refused = isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code in (401, 403)
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | HFValidationError) and not isinstance(error, GatedRepoError):
        what, code = "neither a folder here nor a repository on the Hub (or a private one)", "hub_not_found"
        remedy = f"check the name and the revision; a folder is written ./{repository}"
    elif refused or isinstance(error, GatedRepoError):
        what, code, remedy = "its owner lends it on request", "hub_gated", "ask on its page, then run: hf auth login"
    elif isinstance(error, OSError) and error.errno in _NO_ROOM:
        what, code, remedy = (
            f"its files cannot be kept ({error.strerror})",
            "cannot_write",
            "free some space, or set HF_HOME to another disk",
        )
    else:
        what, code = "it is not whole in the cache, and the Hub cannot be reached", "hub_unreachable"
        remedy = "go online (HF_HUB_OFFLINE unset) and try again, what has come is kept; or name a folder"
    return CheckpointError(what, code=code, where=where, remedy=remedy)
