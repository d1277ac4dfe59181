"""Names of models: what is here wins, built-in names follow, then the Hub, and each failure says what to do."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from llavakit.checkpoint import places
from llavakit.errors import CheckpointError
from llavakit.model.presets import ModelConfig
from llavakit.tiling import HD, RELEASED

Fetch = Callable[..., str]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Fetch], list[dict[str, Any]]]:
    """Puts a function in the place of the Hub; returns what it is asked for. The working folder is empty."""
    monkeypatch.chdir(tmp_path)

    def install(fetch: Fetch) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def snapshot_download(repository: str, **options: Any) -> str:
            asked.append({"repository": repository, **options})
            return fetch(**options)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return install


def test_what_exists_here_wins(hub: Any, tmp_path: Path) -> None:
    asked = hub(lambda **_: "")
    for name in ("tiny", "owner/name"):
        (tmp_path / name).mkdir(parents=True)
        assert places.find(name) == Path(name)
    assert asked == []


def test_no_name_and_tiny_are_the_built_in_model(hub: Any) -> None:
    assert places.find(None) == places.find("tiny") == places.built_in()


def test_every_built_in_model_is_there_and_sees_what_it_should(hub: Any) -> None:
    canvases = {
        name: len(ModelConfig.from_hf(json.loads((places.find(name) / "config.json").read_text())).canvases) for name in places.BUILT_IN
    }
    assert canvases == {"tiny": 0, "tiny-next": len(RELEASED), "tiny-hd": len(HD)}


@pytest.mark.parametrize("name", ["./owner/name", "/owner/name", "a/b/c", "nothing", "../x", "owner/", "models/x"])
def test_what_can_only_be_a_folder_is_never_asked_for(hub: Any, name: str, tmp_path: Path) -> None:
    asked = hub(lambda **_: "")
    (tmp_path / "models").mkdir()
    assert places.find(name) == Path(name)
    assert asked == []


def test_a_repository_is_fetched_without_pickles(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").touch()
    asked = hub(lambda **_: str(tmp_path / "snapshot"))
    assert places.find("owner/name", revision="v1", allow_pickle=True) == tmp_path / "snapshot"
    assert [(one["repository"], one["revision"]) for one in asked] == [("owner/name", "v1")]
    assert "*.bin" not in asked[0]["allow_patterns"]
    assert {"*.json", "*.safetensors", "*.jinja"} <= set(asked[0]["allow_patterns"])
    assert asked[0]["ignore_patterns"] == ["*/*"]


def test_pickled_weights_are_fetched_only_when_allowed(hub: Any, tmp_path: Path) -> None:
    asked = hub(lambda **_: str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        places.find("owner/name")
    assert (caught.value.code, caught.value.where) == ("pickle_refused", "owner/name")
    assert len(asked) == 1
    assert places.find("owner/name", allow_pickle=True) == tmp_path
    assert "*.bin" in asked[-1]["allow_patterns"]


def _answer(status: int) -> Any:
    """All that the library's errors read of a response (its HTTP library has changed between versions)."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GatedRepoError("gated", response=_answer(403)), "hub_gated"),
        (RepositoryNotFoundError("none", response=_answer(404)), "hub_not_found"),
        (RevisionNotFoundError("none", response=_answer(404)), "hub_not_found"),
        (HfHubHTTPError("busy", response=_answer(503)), "hub_unreachable"),
        (LocalEntryNotFoundError("offline"), "hub_unreachable"),
        (ConnectionError("no route"), "hub_unreachable"),
        (RuntimeError("a broken stream, of a library below"), "hub_unreachable"),
        (HfHubHTTPError("bad token", response=_answer(401)), "hub_gated"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot_write"),
    ],
)
def test_what_went_wrong_at_the_hub_is_said(hub: Any, error: Exception, code: str) -> None:
    def fail(**_: Any) -> str:
        raise error

    hub(fail)
    with pytest.raises(CheckpointError) as caught:
        places.find("owner/name", revision="main")
    assert (caught.value.code, caught.value.where) == (code, "owner/name@main")
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["a--b/c", "owner/name.git", "owner/na..me", "owner/name-"])
def test_a_name_that_no_repository_can_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        places.find(name)
    assert caught.value.code == "hub_not_found"


def test_a_commit_is_read_from_the_cache_alone(tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    assert places.commit_of(tmp_path / "snapshots" / commit) == commit
    assert places.commit_of(tmp_path / commit) is None
    assert places.commit_of(tmp_path / "snapshots" / "main") is None


def test_offline_mode_asks_the_cache_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the library's own offline switch and an empty cache: an answer of ours, at once, without a connection."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        places.find("owner/name")
    assert caught.value.code == "hub_unreachable"
