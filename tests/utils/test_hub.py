"""The hub without a hub: what is in its cache or beside it is found, what is not is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hub import HubError, download, resolve_dataset, resolve_folder


def cached(cache: Path, kind: str, repo: str, names: list[str], revision: str = "main", commit: str = "a" * 40) -> Path:
    """A repository as huggingface_hub keeps it."""
    folder = cache / f"{kind}s--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    snapshot = folder / "snapshots" / commit
    for name in names:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_text(f"{repo} {revision} {name}")
    return snapshot


def test_a_model_in_the_cache_is_found_by_name_and_revision(tmp_path: Path) -> None:
    main = cached(tmp_path, "model", "maker/model", ["config.json", "model.safetensors"])
    other = cached(tmp_path, "model", "maker/model", ["config.json", "model.safetensors"], "v2", "b" * 40)
    cache = str(tmp_path)
    assert resolve_folder("maker/model", cache_dir=cache) == main
    assert resolve_folder("maker/model", cache_dir=cache, revision="v2") == other
    assert download("maker/model", ["*.json"], cache_dir=cache, revision="v2") == other
    pickled = cached(tmp_path, "model", "maker/older", ["config.json", "pytorch_model.bin"])
    assert resolve_folder("maker/older", cache_dir=cache) == pickled


@pytest.mark.parametrize("name", ["maker/absent", "absent"])
def test_a_model_that_is_nowhere_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=rf"^{name} is not a folder here, and the hub did not .*: ask her$") as caught:
        resolve_folder(name, cache_dir=str(tmp_path), hint="ask her")
    assert "\n" not in str(caught.value)
    with pytest.raises(HubError):
        download(name, ["*"], cache_dir=str(tmp_path))


def test_a_path_that_is_no_checkpoint_is_never_taken_to_the_hub(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "file", "a/b/c", "/nowhere/model", "name with space", ""):
        with pytest.raises(UsageError, match=r"is neither a checkpoint folder nor a hub id|is no checkpoint"):
            resolve_folder(name)
    with pytest.raises(UsageError, match=r"is no checkpoint: it holds no config.json"):
        resolve_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_folder(str(tmp_path)) == tmp_path


def test_a_file_of_a_dataset_comes_from_the_first_place_that_has_it(tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    cache = tmp_path / "cache"
    snapshot = cached(cache, "dataset", "maker/data", ["a/docs-0.gz", "a/docs-1.gz"])
    found = resolve_dataset("maker/data", "a", pattern="a/docs-*", places=places, cache_dir=str(cache))
    assert found == snapshot / "a"
    (places[1] / "a").mkdir(parents=True)
    assert resolve_dataset("maker/data", "a", places=places, cache_dir=str(cache)) == places[1] / "a"
    (places[0] / "a").mkdir(parents=True)
    assert resolve_dataset("maker/data", "a", places=places, cache_dir=str(cache)) == places[0] / "a"
    assert resolve_dataset("maker/data", "a/docs-1.gz", cache_dir=str(cache)) == snapshot / "a" / "docs-1.gz"
    with pytest.raises(HubError, match="the dataset holds no such file"):
        resolve_dataset("maker/data", "b", cache_dir=str(cache))
    with pytest.raises(HubError):  # a model of that name is no dataset
        cached(cache, "model", "maker/model", ["x"])
        resolve_dataset("maker/model", "x", cache_dir=str(cache))
