"""Which build of llama.cpp knows what: `verification/gguf/llama_builds.json`, written from a clone's history.

    python scripts/llama_builds.py CLONE [COMMIT]

A build's number is the number of commits up to it (`git rev-list --count`): llama.cpp prints it, and its releases are
tagged with it. Of every name that COMMIT's source lists (an architecture, a tensor type, a tokenizer, a pre-tokenizer,
a key, a tensor of an architecture) the first commit that lists it gives the build, and the number in that commit's
subject is the pull request. Only text is read; nothing of the clone is run or copied.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TARGET = Path(__file__).parent.parent / "verification" / "gguf" / "llama_builds.json"
ONE_FILE = ("llama.cpp", "src/llama.cpp")  # in which everything stood, until it was split
ABOUT = "Names that llama.cpp knows, each with the first build that knows it and the pull request that brought it."
_LISTED = r'\{{\s*{}_\w+\s*,\s*"([^"]+)"\s*\}}'
_VOCABULARY = (*ONE_FILE, "src/llama-model.cpp", "src/llama-vocab.cpp")
# section -> (files that held the list, over time; what an item looks like)
SECTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "architectures": ((*ONE_FILE, "src/llama-arch.cpp"), _LISTED.format("LLM_ARCH")),
    "keys": ((*ONE_FILE, "src/llama-arch.cpp"), _LISTED.format("LLM_KV")),
    "tokenizers": (_VOCABULARY, r'tokenizer_(?:model|name)\s*==\s*"([^"]+)"'),
    "pre_tokenizers": (_VOCABULARY, r'tokenizer_pre\s*==\s*"([^"]+)"'),
    "types": (("ggml.h", "ggml/include/ggml.h"), r"GGML_TYPE_(\w+)\s*=\s*\d+"),
}
VERSIONS = ("ggml.h", "ggml/include/ggml.h", "gguf.h", "ggml/include/gguf.h")
CHANGED = {"IQ1_S": 5999}  # type -> the pull request that gave its blocks another layout under the same number
NO_NAMES = {"(unknown)", "COUNT", "no_vocab"}
_MODELS = "src/models/"


class Clone:
    """A git repository that is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._batch = subprocess.Popen(
            ["git", "-C", str(path), "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def git(self, *arguments: str) -> str:
        """What a git command prints."""
        done = subprocess.run(["git", "-C", str(self.path), *arguments], capture_output=True, check=True)
        return done.stdout.decode("utf-8", "replace")

    def text(self, name: str) -> str:
        """A blob without its comments; "" where there is none. `name` is "COMMIT:PATH" or a digest."""
        assert self._batch.stdin is not None
        assert self._batch.stdout is not None
        self._batch.stdin.write(f"{name}\n".encode())
        self._batch.stdin.flush()
        header = self._batch.stdout.readline().split()
        if header[-1] == b"missing":
            return ""
        text = self._batch.stdout.read(int(header[-1]) + 1).decode("utf-8", "replace")
        return re.sub(r"//[^\n]*", "", text)

    def commits(self, head: str, *paths: str) -> list[str]:
        """Commits of master that touched any of the paths, the oldest first."""
        return self.git("rev-list", "--reverse", "--first-parent", head, "--", *paths).split()

    def build(self, commit: str) -> int:
        """The number of a build."""
        return int(self.git("rev-list", "--count", commit))

    def fact(self, commit: str) -> tuple[int, int | None]:
        """(build, pull request) of a commit."""
        number = re.search(r"\(#(\d+)\)", self.git("log", "-1", "--format=%s", commit))
        return self.build(commit), int(number[1]) if number else None


Names = set[str] | set[tuple[str, str]]
Fact = tuple[int, int | None]  # build, pull request


def first_seen(history: Iterator[tuple[str, Names]], clone: Clone) -> dict[str | tuple[str, str], Fact]:
    """Of every name of the last commit the fact of the first that had it."""
    since: dict[str | tuple[str, str], str] = {}
    names: Names = set()
    for commit, names in history:
        for name in names:
            since.setdefault(name, commit)
    facts = {commit: clone.fact(commit) for commit in {since[name] for name in names}}
    return {name: facts[since[name]] for name in names}


def listed(clone: Clone, head: str, paths: tuple[str, ...], item: str) -> Iterator[tuple[str, Names]]:
    """Each commit with the names that its files list."""
    for commit in clone.commits(head, *paths):
        yield commit, set(re.findall(item, "".join(clone.text(f"{commit}:{path}") for path in paths))) - NO_NAMES


_STEP = re.compile(r'(case)\s+(LLM_ARCH_\w+)\s*:|tn\(\s*(LLM_TENSOR_\w+)\s*(?:,\s*"([^"]+)")?|(create_tensor_qkv)\(')
_QKV = {(f"LLM_TENSOR_ATTN_{part}", end) for part in ("Q", "K", "V", "QKV") for end in ("weight", "bias")}


def by_case(text: str) -> Iterator[tuple[str, str, str]]:
    """(architecture's id, tensor's id, ending) of a function that switches over architectures."""
    labels: list[str] = []
    tensors_since = False
    for case, arch, tensor, ending, qkv in _STEP.findall(text):
        if case:
            labels = [arch] if tensors_since else [*labels, arch]
            tensors_since = False
            continue
        tensors_since = True
        for name, end in _QKV if qkv else {(tensor, ending)}:
            yield from ((label, name, end) for label in labels)


def architecture_tensors(clone: Clone, head: str) -> Iterator[tuple[str, Names]]:
    """Each commit with (architecture, tensor) of what its loader creates; classes of a model a file since PR 22004."""
    table = clone.text(f"{head}:src/llama-arch.cpp")
    arch_names = dict(re.findall(r'\{\s*(LLM_ARCH_\w+)\s*,\s*"([^"]+)"\s*\}', table))
    tensor_names = dict(re.findall(r'\{\s*(LLM_TENSOR_\w+)\s*,\s*"([^"]+)"\s*\}', table))
    parsed: dict[str, dict[str, set[tuple[str, str]]]] = {}

    def named(arch: str, tensor: str, ending: str) -> tuple[str, str] | None:
        if arch not in arch_names or tensor not in tensor_names:
            return None
        return arch_names[arch], tensor_names[tensor] + (f".{ending}" if ending else "")

    def classes(blob: str) -> dict[str, set[tuple[str, str]]]:
        """class -> (tensor's id, ending) that its file creates."""
        if blob not in parsed:
            found: dict[str, set[tuple[str, str]]] = {}
            parts = re.split(r"(llama_model_\w+)::load_arch_tensors", clone.text(blob))
            for name, body in zip(parts[1::2], parts[2::2], strict=True):
                for _, _, tensor, ending, qkv in _STEP.findall(body):
                    found.setdefault(name, set()).update(_QKV if qkv else {(tensor, ending)} if tensor else set())
            parsed[blob] = found
        return parsed[blob]

    for commit in clone.commits(head, *ONE_FILE, "src/llama-model.cpp", _MODELS):
        model = "".join(clone.text(f"{commit}:{path}") for path in (*ONE_FILE, "src/llama-model.cpp"))
        pairs = {one for row in by_case(model) if (one := named(*row))}
        created: dict[str, set[tuple[str, str]]] = {}
        for line in clone.git("ls-tree", "-r", commit, "--", _MODELS).splitlines():
            about, path = line.split("\t")
            if path.endswith(".cpp"):
                created |= classes(about.split()[2])
        if created:
            header = clone.text(f"{commit}:{_MODELS}models.h")
            parents = dict(re.findall(r"struct (llama_model_\w+) : public (llama_model_\w+)", header))
            for labels, made in re.findall(r"((?:case LLM_ARCH_\w+:\s*)+)\{?\s*return new (llama_model_\w+)", model):
                while made not in created and made in parents:
                    made = parents[made]
                for arch in re.findall(r"LLM_ARCH_\w+", labels):
                    pairs |= {one for row in created.get(made, ()) if (one := named(arch, *row))}
        yield commit, pairs


def versions(clone: Clone, head: str) -> dict[str, Fact]:
    """GGUF's versions; a reader of one reads the earlier ones."""
    found: dict[str, Fact] = {}
    for commit, names in listed(clone, head, VERSIONS, r"#define\s+GGUF_VERSION\s+(\d+)"):
        for name in names:
            found.setdefault(str(name), clone.fact(commit))
    return found


_SCALES = ("scale", "input_scale")  # beside any tensor of any architecture, created in one place


def later(pairs: dict, sections: dict[str, dict]) -> tuple[dict[str, Fact], dict[str, dict[str, Fact]]]:
    """What came after its architecture: endings of tensors' names, and tensors by architecture."""
    own, oldest = sections["architectures"], sections["gguf_versions"]["2"][0]  # no older files are read here
    endings: dict[str, Fact] = {}
    tensors: dict[str, dict[str, Fact]] = {}
    for (arch, tensor), fact in sorted(pairs.items()):
        if fact[0] <= own.get(arch, fact)[0] or fact[0] <= oldest:
            continue
        ending = tensor.rpartition(".")[2]
        if ending in _SCALES:
            endings[ending] = min(endings.get(ending, fact), fact)
        else:
            tensors.setdefault(arch, {})[tensor] = fact
    return endings, tensors


def main() -> None:
    """Write the table."""
    clone, head = Clone(Path(sys.argv[1])), sys.argv[2] if len(sys.argv) > 2 else "HEAD"
    sections: dict[str, dict] = {"gguf_versions": versions(clone, head)}
    for name, (paths, item) in SECTIONS.items():
        sections[name] = first_seen(listed(clone, head, paths, item), clone)
    for kind, request in CHANGED.items():
        sections["types"][kind] = clone.fact(
            clone.git("log", "-1", "--format=%H", head, f"--grep=(#{request})").strip()
        )
    pairs = dict(first_seen(architecture_tensors(clone, head), clone))
    sections["later_endings"], sections["later_tensors"] = later(pairs, sections)
    parts = [f'"about": {json.dumps(ABOUT)}', f'"newest": {clone.build(head)}']
    for name, rows in sections.items():
        body = ",\n".join(f"  {json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows))
        parts.append(f'"{name}": {{\n{body}\n}}')
    TARGET.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    print({name: len(rows) for name, rows in sections.items()}, len(pairs))


if __name__ == "__main__":
    main()
