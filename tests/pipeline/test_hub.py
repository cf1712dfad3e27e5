"""Laws of hub ids: a path that is here is a path; an id gives data files only; what the hub has not is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import Hub, fake_hub

from pipeline.hub import HubId, hub_id

ASK = """
import json, sys
from pathlib import Path
from pipeline import hub
from so8t_core.errors import InputError
for kind, given in json.loads(sys.argv[1]):
    try:
        found = getattr(hub, kind)(Path(given))
        files = sorted(p.name for p in found.iterdir()) if found.is_dir() else found.read_bytes().decode()
        print(json.dumps(files))
    except InputError as error:
        print(json.dumps({"refused": str(error)}))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with fake_hub() as running:
        model = tmp_path / "model"
        (model / "sub").mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "modeling_x.py"):
            (model / name).write_text(name)
        (model / "pytorch_model.bin").write_text("pickle")
        running.add("me/model", model)
        running.models["me/files"] = {
            "tiny-Q8_0.gguf": b"eight",
            "tiny-Q4_K_M.gguf": b"four",
            "sub/other.Q6_K.gguf": b"six",
            "README.md": b"",
        }
        yield running


def ask(hub: Hub, home: Path, *ids: tuple[str, str]) -> list[object]:
    """What `pipeline.hub` makes of ids, in a process whose hub is this one."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(ids)],
        env={**os.environ, **hub.environment(home / "hf")},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=home,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_ids_give_their_data_files_and_nothing_that_runs(hub: Hub, tmp_path: Path) -> None:
    commit = hub.commit("me/files")
    found = ask(
        hub,
        tmp_path,
        ("checkpoint", "me/model"),
        ("gguf_file", "me/files/tiny-Q8_0.gguf"),
        ("gguf_file", "me/files:q4_k_m"),
        ("gguf_file", "me/files:Q6_K"),
        ("gguf_file", f"me/files@{commit}/sub/other.Q6_K.gguf"),
        ("gguf_file", "me/files@main:Q8_0"),
    )
    data = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert found == [data, "eight", "four", "six", "six", "eight"]
    assert not any(".py" in request or ".bin" in request for request in hub.requests)


def test_a_set_of_shards_is_fetched_whole(hub: Hub, tmp_path: Path) -> None:
    shards = {f"sub/big-Q6_K-{n:05}-of-00003.gguf": b"six" if n == 1 else b"more" for n in (1, 2, 3)}
    hub.models["me/sets"] = {**shards, "sub/big-Q8_0.gguf": b"eight"}
    found = ask(hub, tmp_path, ("gguf_file", "me/sets:Q6_K"), ("gguf_file", "me/sets/sub/big-Q6_K-00002-of-00003.gguf"))
    assert found == ["six", "six"]
    assert all(any(name in request for request in hub.requests) for name in shards)


def test_what_the_hub_has_not_is_refused_in_a_line_with_a_way_out(hub: Hub, tmp_path: Path) -> None:
    asked = [
        ("checkpoint", "me/nothing"),
        ("checkpoint", "me/model@v9"),
        ("gguf_file", "me/files/gone.gguf"),
        ("gguf_file", "me/files:Q2_K"),
        ("gguf_file", "me/files"),
        ("gguf_file", "me/model"),
    ]
    found = ask(hub, tmp_path, *asked)
    for (_, given), answer in zip(asked, found, strict=True):
        assert isinstance(answer, dict), (given, answer)
        said = answer["refused"]
        assert given in said
        assert "\n" not in said
        assert any(way in said for way in ("Check the id", "Give a checkpoint directory", "Name one as")), said
    assert "tiny-Q8_0.gguf" in str(found[3])


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("Qwen/Qwen3-0.6B", HubId("Qwen/Qwen3-0.6B", None, None, None)),
        ("Qwen/Qwen3-0.6B@v1.0", HubId("Qwen/Qwen3-0.6B", "v1.0", None, None)),
        ("me/files:Q4_K_M", HubId("me/files", None, None, "Q4_K_M")),
        ("me/files@abc/sub/x.gguf", HubId("me/files", "abc", "sub/x.gguf", None)),
        ("my-model", None),
        ("model.gguf", None),
        ("/tmp/me/model", None),
        ("../me/model", None),
        ("here/model", None),
        ("here/gone/x.gguf", None),
        ("a/b/c/d", None),
    ],
)
def test_what_is_an_id_and_what_a_path(
    given: str, found: HubId | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped path below a folder that is here is never sent to the hub."""
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id(given) == found


def test_lint_takes_ids_of_reference_and_file(hub: Hub, tiny_dir: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    hub.add("me/tiny", tiny_dir)
    hub.models["me/tiny-GGUF"] = {"tiny-F32.gguf": tiny_gguf.read_bytes()}
    command = [sys.executable, "-m", "pipeline.cli.main", "lint", "me/tiny-GGUF:F32", "--reference", "me/tiny"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        env={**os.environ, **hub.environment(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    here = json.loads((tmp_path / "out" / "lint.json").read_text())
    shutil.rmtree(tmp_path / "hf")
    assert done.returncode in (0, 1), done.stderr
    assert {check["name"]: check["status"] for check in here["checks"]}["weights"] == "pass"
    assert here["reference"].rpartition("/snapshots/")[0].endswith("models--me--tiny")
