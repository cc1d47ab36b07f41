"""Where models come from: folders, the Hugging Face cache, and a hub that is never really asked."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub as hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from analyzers.engine import builtin, sources
from analyzers.engine.sources import find, listed, resolve
from analyzers.errors import CandorError, ModelError, ModelNotFound, ModelUnsafe, Stopped

COMMIT = "a" * 40
TEXTS = ["config.json", "tokenizer.json"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = '{{"weight_map": {{"a": "{}", "b": "{}", "c": "{}"}}}}'.format(*SHARDS, SHARDS[0])


def no_network(*args: object, **options: object) -> None:
    raise AssertionError("the hub was asked")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A Hugging Face cache of its own, and nobody on the other side."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(hub.HfApi, "model_info", no_network)
    monkeypatch.setattr(hub, "hf_hub_download", no_network)
    return folder


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "home" / "models"
    monkeypatch.setenv("CANDOR_HOME", str(folder.parent))
    return folder


def put(cache: Path, repo: str, files: dict[str, str | bytes]) -> Path:
    place = cache / f"models--{repo.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        raw = content.encode() if isinstance(content, str) else content
        (snapshot / name).write_bytes(raw)
    return snapshot


def put_model(cache: Path, repo: str = "org/name") -> Path:
    return put(cache, repo, dict.fromkeys((*TEXTS, "model.safetensors"), "{}"))


def on_the_hub(monkeypatch, cache: Path, files: dict[str, bytes], repo: str = "org/name") -> list:
    """Serve these files as the hub; returns the list of what gets downloaded."""
    downloaded: list[str] = []

    def model_info(self, name: str, **options: object) -> SimpleNamespace:
        assert name == repo and options["files_metadata"]
        siblings = [SimpleNamespace(rfilename=n, size=len(raw)) for n, raw in files.items()]
        return SimpleNamespace(siblings=siblings)

    def download(name: str, file: str, cache_dir: str, tqdm_class: Callable) -> None:
        assert cache_dir == str(cache)
        with tqdm_class(total=len(files[file]), initial=0, unit="B", desc=file) as bar:
            for _ in range(2):
                bar.update(len(files[file]) / 2)
        downloaded.append(file)
        put(cache, name, {file: files[file]})

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    return downloaded


def refusal(ref: str, error: type[CandorError] = ModelNotFound) -> str:
    with pytest.raises(error) as caught:
        resolve(ref)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 600
    return sentence


# On this disk


def test_a_folder_and_a_gguf_are_taken_as_they_are(tmp_path):
    for name in (*TEXTS, "model.safetensors", "m.gguf"):
        (tmp_path / name).write_text("{}")
    folder = resolve(str(tmp_path))
    assert (folder.kind, folder.folder, folder.gguf) == ("folder", tmp_path, None)
    assert folder.weights == [tmp_path / "model.safetensors"]
    gguf = resolve(str(tmp_path / "m.gguf"))
    assert (gguf.kind, gguf.folder, gguf.gguf) == ("gguf", tmp_path, "m.gguf")
    assert gguf.weights == [tmp_path / "m.gguf"]


def test_only_the_weights_that_are_loaded_count(tmp_path):
    for name in ("config.json", "consolidated.safetensors", *SHARDS):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(INDEX)
    assert [path.name for path in resolve(str(tmp_path)).weights] == SHARDS


def test_a_builtin_is_made_when_it_is_missing(models, monkeypatch):
    made: list[str] = []

    def ensure(name: str, folder: Path, progress: object) -> Path:
        made.append(name)
        return folder / name

    monkeypatch.setattr(builtin, "ensure", ensure)
    assert find("smollm2-135m") is None
    source = resolve("smollm2-135m")
    assert made == ["smollm2-135m"]
    assert (source.kind, source.folder) == ("builtin", models / "smollm2-135m")


def test_a_path_comes_before_the_hub(tmp_path, monkeypatch, cache):
    put_model(cache)
    monkeypatch.chdir(tmp_path)
    local = tmp_path / "org" / "name"
    local.mkdir(parents=True)
    for name in (*TEXTS, "model.safetensors"):
        (local / name).write_text("{}")
    assert resolve("org/name").kind == "folder"


# The Hugging Face cache


def test_a_cached_model_is_found_without_asking_the_hub(cache):
    snapshot = put_model(cache)
    source = resolve("org/name")
    assert source == find("org/name")
    assert (source.ref, source.kind, source.folder) == ("org/name", "hub", snapshot)


@pytest.mark.parametrize("missing", [*SHARDS, "config.json", "model.safetensors.index.json"])
def test_a_download_that_was_stopped_is_not_taken_for_the_model(cache, missing):
    files = {"model.safetensors.index.json": INDEX} | dict.fromkeys((*TEXTS, *SHARDS), "{}")
    put(cache, "org/whole", files)
    assert find("org/whole") is not None
    del files[missing]
    if missing.endswith("index.json"):
        del files[SHARDS[0]], files[SHARDS[1]]
    put(cache, "org/name", files)
    assert find("org/name") is None


def test_one_gguf_of_a_repository(cache):
    snapshot = put(cache, "org/name", {"a.Q4.gguf": "x"})
    for ref in ("org/name", "org/name/a.Q4.gguf"):
        source = resolve(ref)
        assert (source.kind, source.gguf, source.weights) == (
            "hub", "a.Q4.gguf", [snapshot / "a.Q4.gguf"]
        )  # fmt: skip
    put(cache, "org/name", {"b.Q8.gguf": "y"})
    assert find("org/name") is None
    found = find("org/name/b.Q8.gguf")
    assert found is not None and found.gguf == "b.Q8.gguf"


def test_code_is_fetched_only_when_it_is_allowed(cache):
    snapshot = put_model(cache)
    (snapshot / "config.json").write_text('{"auto_map": {"AutoModel": "own.Own"}}')
    assert find("org/name") is not None
    assert find("org/name", remote_code=True) is None
    (snapshot / "own.py").write_text("")
    assert find("org/name", remote_code=True) is not None


# The hub


def test_a_model_is_fetched_with_nothing_beside_it(monkeypatch, cache):
    wanted = dict.fromkeys(TEXTS, b"{}") | {"model.safetensors": b"x" * 96}
    others = ("pytorch_model.bin", "README.md", "onnx/model.onnx", "own.py", "model.fp16.gguf",
              "original/model.safetensors", "consolidated.safetensors")  # fmt: skip
    downloaded = on_the_hub(monkeypatch, cache, wanted | dict.fromkeys(others, b"?"))
    told: list[tuple[str, float]] = []
    source = resolve("org/name", lambda what, share: told.append((what, share)))
    assert downloaded == list(wanted)
    assert (source.kind, source.weights[0].read_bytes()) == ("hub", b"x" * 96)
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert 0.02 < shares[-2] < 0.9, "it tells while a file arrives"
    assert "org/name" in told[0][0] and "model.safetensors" in told[-1][0]
    monkeypatch.setattr(hub, "hf_hub_download", no_network)
    assert resolve("org/name") == source


def test_its_code_comes_along_when_allowed(monkeypatch, cache):
    files = {"config.json": b'{"auto_map": {}}', "own.py": b"", "model.safetensors": b"x"}
    downloaded = on_the_hub(monkeypatch, cache, files)
    resolve("org/name", remote_code=True)
    assert downloaded == list(files)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_stop_ends_the_download(monkeypatch, cache, share):
    files = {"config.json": b"{}", "model.safetensors.index.json": INDEX.encode()}
    files |= dict.fromkeys(SHARDS, b"x" * 500)
    downloaded = on_the_hub(monkeypatch, cache, files)

    def stop(what: str, done: float) -> None:
        if done >= share:
            raise Stopped("enough")

    with pytest.raises(Stopped):
        resolve("org/name", stop)
    assert SHARDS[1] not in downloaded and find("org/name") is None


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt"])
def test_only_pickles_are_refused_before_anything_is_downloaded(monkeypatch, cache, name):
    downloaded = on_the_hub(monkeypatch, cache, {"config.json": b"{}", name: b"x"})
    sentence = refusal("org/name", ModelUnsafe)
    assert name in sentence and "Nothing was downloaded" in sentence and downloaded == []


def test_a_repository_without_weights_or_with_a_choice_of_them_says_so(monkeypatch, cache):
    on_the_hub(monkeypatch, cache, {"README.md": b""})
    assert "no weights" in refusal("org/name")
    on_the_hub(monkeypatch, cache, {"a.gguf": b"", "b.gguf": b""})
    sentence = refusal("org/name")
    assert "several" in sentence and "a.gguf, b.gguf" in sentence
    assert "no file c.gguf" in refusal("org/name/c.gguf")
    assert resolve("org/name/b.gguf").gguf == "b.gguf"


def test_offline_says_what_was_tried(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/no/such/cache")
    sentence = refusal("org/name")
    assert "not in the Hugging Face cache" in sentence and "HF_HUB_OFFLINE" in sentence
    assert "smollm2-135m" in sentence


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RepositoryNotFoundError("404 Client Error", response=Mock()), ModelNotFound, "no public"),
        (GatedRepoError("403 Client Error", response=Mock()), ModelNotFound, "hf auth login"),
        (ConnectionError("Name or service not known\nsecond line"), ModelNotFound,
         "does not answer (Name or service not known): connect once"),
        (RuntimeError(""), ModelNotFound, "does not answer (RuntimeError)"),
        (OSError(28, "No space left on device"), ModelError, "make room there"),
    ],
)  # fmt: skip
def test_what_the_hub_raises_is_one_sentence(monkeypatch, error, kind, words):
    monkeypatch.setattr(hub.HfApi, "model_info", Mock(side_effect=error))
    assert words in refusal("org/name", kind)


@pytest.mark.parametrize("ref", ["no-such-model", "../up", "a/b/c/d", "org/na me", "", "org/"])
def test_what_is_no_hub_name_is_not_asked_for(ref):
    if ref == "":
        ref = "\0"
    assert "There is no model" in refusal(ref)


# The picker


def test_the_list_has_builtins_first_then_the_cache_by_title(cache, monkeypatch):
    put_model(cache, "org/Second")
    put_model(cache, "org/first")
    put(cache, "org/third", {"a.gguf": "xyz", "b.gguf": "x"})
    put(cache, "org/stopped", {"config.json": "{}"})
    put(cache, "org/pickled", {"config.json": "{}", "pytorch_model.bin": "x"})
    broken = cache / "models--org--broken" / "snapshots"
    broken.mkdir(parents=True)
    (broken / "a file").write_text("")
    found = listed()
    builtins = found[: len(builtin.MODELS)]
    assert [each.ref for each in builtins] == list(builtin.MODELS)
    assert not any(each.ready for each in builtins)
    assert builtins[0].size == builtin.MODELS[builtins[0].ref].download
    rest = found[len(builtins) :]
    assert [(each.ref, each.size) for each in rest] == [
        ("org/first", 2), ("org/Second", 2), ("org/third/a.gguf", 3), ("org/third/b.gguf", 1)
    ]  # fmt: skip
    assert all(each.ready and each.kind == "hub" for each in rest)
    assert all(find(each.ref) is not None for each in rest)


def test_a_builtin_on_the_disk_is_ready(monkeypatch, models):
    there = builtin.Cached("smollm2-135m", models / "smollm2-135m", 77, True)
    monkeypatch.setattr(sources.builtin, "cached", lambda folder: [there])
    first = listed()[0]
    assert (first.ref, first.ready, first.size) == ("smollm2-135m", True, 77)


def test_a_missing_or_broken_cache_lists_the_builtins_alone(cache):
    assert {each.kind for each in listed()} == {"builtin"}
    cache.write_text("a file where a folder should be")
    assert {each.kind for each in listed()} == {"builtin"}
