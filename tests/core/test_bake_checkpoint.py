"""bake_checkpoint against the machine: little memory, full and read-only disks, kills, two at once; real ones."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from core_models import LORA, randomise, tiny_llama
from forked import begin, forked
from safetensors.torch import load_file

from so8t_core import InputError, SO8TConfig, attach, bake_checkpoint, save_adapter
from so8t_core.files import sha256_path
from so8t_core.safetensors_header import read_entries
from so8t_core.safetensors_stream import CHUNK

VOCAB = 200_000  # embedding and head are 25.6 MB each, the folded weights 4 KB
SHARD = 30_000_000


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("big") / "base"
    tiny_llama(vocab_size=VOCAB).save_pretrained(directory, max_shard_size=f"{SHARD // 1000}KB")
    assert len(list(directory.glob("*.safetensors"))) == 2
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = randomise(attach(tiny_llama(), SO8TConfig(lora=LORA)))
    return save_adapter(model, tmp_path_factory.mktemp("big") / "adapter")


@pytest.fixture(scope="module")
def other_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = randomise(attach(tiny_llama(), SO8TConfig()), seed=7)
    return save_adapter(model, tmp_path_factory.mktemp("big") / "other")


@pytest.fixture(scope="module")
def want(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the right result."""
    return sha256_path(bake_checkpoint(base, adapter, tmp_path_factory.mktemp("big") / "want"))


START = (
    "import os, signal, sys\nimport torch; torch.set_num_threads(1)\n"
    "from so8t_core import InputError, bake_checkpoint\nB, A, O = sys.argv[1:4]\n"
)


def run(code: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own, where B, A and O are base, adapter and out."""
    command = [*prefix, sys.executable, "-c", START + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run_forked(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in a child of this process, which has imported torch already."""

    def work() -> None:
        sys.argv = ["-c", *map(str, arguments)]
        exec(START + code, {})

    return forked(work)


def test_only_the_adapted_bytes_change_and_progress_counts_them_all(tmp_path, base, adapter):
    seen: list[tuple[int, int]] = []
    out = bake_checkpoint(base, adapter, tmp_path / "out", progress=lambda *pair: seen.append(pair))
    total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert {whole for _, whole in seen} == {total}
    done = [0, *(bytes_ for bytes_, _ in seen)]
    assert done[-1] == total
    assert max(b - a for a, b in pairwise(done)) <= CHUNK  # no piece goes by unseen
    assert sorted(done) == done
    changed = set()
    for file in base.glob("*.safetensors"):
        old, new = file.read_bytes(), (out / file.name).read_bytes()
        assert len(old) == len(new)
        position = len(old) - sum(entry.nbytes for entry in read_entries(file))
        assert old[:position] == new[:position]  # the header
        for entry in read_entries(file):
            if old[position : position + entry.nbytes] != new[position : position + entry.nbytes]:
                changed.add(entry.name)
            position += entry.nbytes
        assert position == len(old)
    assert changed == {f"model.layers.{k}.self_attn.{p}_proj.weight" for k in range(3) for p in "qo"}


MEASURE = """
from so8t_core.folding import Fold
def of(name): return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(name))
for dtype in (None, torch.bfloat16):
    bake_checkpoint(sys.argv[4], A, O, dtype=dtype)  # what is loaded on first use is no part of it
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = of("VmRSS")
    bake_checkpoint(B, A, O, dtype=dtype)
    print(of("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_that_of_a_few_pieces_and_not_of_the_file(tmp_path, base, adapter):
    """Two pieces of 1 MB (one is read while the last is still held), and as many again that a cast makes of them: below
    8 pieces, where mapping one file or reading one tensor would take 25 MB."""
    tiny_llama().save_pretrained(tmp_path / "small")
    done = run(MEASURE, base, adapter, tmp_path / "out", tmp_path / "small")
    assert done.returncode == 0, done.stderr
    plain, cast = map(int, done.stdout.split())
    assert plain < 8 << 20
    assert cast < 8 << 20


KILLS = {
    "at the first byte": "progress=lambda done, total: die()",
    "half-way": "progress=lambda done, total: done > total / 2 and die()",
    "at the last byte": "progress=lambda done, total: done == total and die()",
    "before the sync": "sync=1",
    "before the rename": "rename=die",
}
KILL = """
import so8t_core.files as files
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
def start(progress=None, sync=0, rename=None):
    if sync: files.fsync = die
    if rename: files._swap = die
    bake_checkpoint(B, A, O, progress=progress)
start({})
"""


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("moment", KILLS.values(), ids=KILLS)
def test_a_kill_leaves_the_earlier_result_or_none(tmp_path, base, adapter, want, moment, existing):
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "config.json").write_text("earlier")
    done = run_forked(KILL.format(moment), base, adapter, out)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert out.exists() == existing
    assert not existing or [p.read_text() for p in out.iterdir()] == ["earlier"]
    assert all(p.name.startswith(".so8t-out.") and p.name.endswith(".tmp") for p in tmp_path.iterdir() if p != out)
    assert sha256_path(bake_checkpoint(base, adapter, out)) == want  # what lies about does not disturb the next


def test_two_at_once_into_one_place_leave_one_of_both_whole(tmp_path, base, adapter, other_adapter, want):
    other = sha256_path(bake_checkpoint(base, other_adapter, tmp_path / "other"))
    shutil.rmtree(tmp_path / "other")

    def five_times(adapter: Path) -> None:
        for _ in range(5):
            bake_checkpoint(base, adapter, tmp_path / "out")

    running = [begin(partial(five_times, one)) for one in (adapter, other_adapter)]
    for end in running:
        done = end()
        assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sha256_path(tmp_path / "out") in (want, other)


def on_disks(*disks: tuple[Path, str, str]) -> tuple[str, ...]:
    """A command prefix that mounts new file systems for one process; each has a place, a size and a preparation."""
    prefix = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    mounts = [
        f'mkdir -p "{disk}" && mount -t tmpfs -o size={size} none "{disk}" && cd "{disk}" && {prepare}'
        for disk, size, prepare in disks
    ]
    script = " && ".join([*mounts, 'exec "$@"'])
    if shutil.which("unshare") is None or subprocess.run([*prefix, script, "sh", "true"], check=False).returncode:
        pytest.skip("no user namespace here to mount a file system in")
    return (*prefix, script, "sh")


TRY = """
for disk in sys.argv[4:]:
    out = os.path.join(disk, "out")
    try: bake_checkpoint(B, A, out)
    except InputError as error: print(error)
    print(sorted(os.listdir(disk)), sorted(os.listdir(out)) if os.path.isdir(out) else "")
"""
FULL = [("20m", False), ("1m", True)]  # size, and whether there is an earlier result; in one process: it imports long
OTHER_DISKS = [("1m", False), ("40m", False), ("20m", True), ("40m", True)]


@pytest.mark.parametrize("cases", [FULL, pytest.param(OTHER_DISKS, marks=pytest.mark.soak)], ids=["two", "four"])
def test_a_full_or_read_only_disk_is_the_users_error_and_leaves_what_was(tmp_path, base, adapter, cases):
    prepare = "mkdir out && echo > out/old"
    disks = [
        (tmp_path / f"full{number}", size, prepare if existing else "true")
        for number, (size, existing) in enumerate(cases)
    ]
    disks.append((tmp_path / "locked", "1m", f'{prepare} && mount -o remount,ro "{tmp_path / "locked"}"'))
    places = [disk for disk, _, _ in disks]
    done = run(TRY, base, adapter, "-", *places, prefix=on_disks(*disks))
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(disks), done.stdout + done.stderr
    for place, existing, said, left in zip(
        places, [e for _, e in cases] + [True], lines[::2], lines[1::2], strict=True
    ):
        reason = "the file system is read-only" if place.name == "locked" else "no space left on the device"
        assert said.startswith(f"cannot write {place / 'out'}: {reason}")
        assert left == ("['out'] ['old']" if existing else "[] ")


def test_a_file_over_the_limit_is_the_users_error_half_way(tmp_path, base, adapter):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, old[1]))
    try:
        with pytest.raises(InputError, match="the file grows over the limit"):
            bake_checkpoint(base, adapter, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def test_types_that_are_no_floats_are_copied_as_they_are(tmp_path, base, adapter):
    from safetensors.torch import save_file

    tensors = {k: v for file in base.glob("*.safetensors") for k, v in load_file(file).items() if "layers" in k}
    odd = {"f8": torch.ones(3).to(torch.float8_e4m3fn), "u16": torch.ones(3, dtype=torch.uint16), "e": torch.ones(0, 2)}
    (tmp_path / "base").mkdir()
    shutil.copyfile(base / "config.json", tmp_path / "base" / "config.json")
    save_file(tensors | odd, tmp_path / "base" / "model.safetensors")
    for dtype in (None, torch.bfloat16):
        out = bake_checkpoint(tmp_path / "base", adapter, tmp_path / "out", dtype=dtype)
        got = load_file(out / "model.safetensors")
        assert set(got) == set(tensors) | set(odd)
        for name in ("f8", "u16"):
            assert got[name].dtype == odd[name].dtype
            assert torch.equal(got[name].view(torch.uint8), odd[name].view(torch.uint8))
        assert got["e"].shape == (0, 2)
