"""The embedded engine: one GGUF through llama.cpp, one generation at a time, first come first served.

Prompt: the file's own chat template, tokenised as in training, with BOS where the file asks for it. Context: as shipped
(`num_ctx` of the Modelfile beside the file, else the pipeline's default), but at most the context of the training, and
at most a LongRoPE's original length, beyond which llama.cpp computes another function than the verified one.
The turn ends at any token of the file's end-of-generation set, at the token that its template writes behind an answer,
and at every `stop` of the Modelfile. Any other control token is an error, except the markers of the form of thinking.
"""

from __future__ import annotations

import asyncio
import datetime
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp

from pipeline.config import ConvertConfig
from pipeline.data.render import as_parts, without_system
from pipeline.data.think_form import Message
from pipeline.release.generate import with_bos
from pipeline.serve.engine import EngineError, Feed, Job
from pipeline.serve.forms.form import Form
from pipeline.serve.forms.of_model import form_of_file, modelfile_beside
from pipeline.serve.request_error import Refusal, invalid
from pipeline.serve.tokens import Tokens
from so8t_core.errors import InputError
from verification.engines import chat_template
from verification.engines.llama_model import LlamaModel, last_words, usable_cores
from verification.engines.sandbox import require_loadable
from verification.gguf.kind import require_logits
from verification.gguf.reader import read_gguf
from verification.reference.rope import limit_of_file

PIECE = 128  # prompt tokens between two checks of the cancel flag


def shipped_n_ctx(gguf: Path) -> int:
    """`num_ctx` of the Modelfile beside the file, else the default of `so8t convert`."""
    found = re.search(r"^PARAMETER num_ctx (\d+)$", modelfile_beside(gguf), re.MULTILINE)
    return int(found[1]) if found else int(ConvertConfig().n_ctx)


def shipped_stops(gguf: Path) -> list[str]:
    """Every `stop` of the Modelfile beside the file."""
    return re.findall(r'^PARAMETER stop "(.+)"$', modelfile_beside(gguf), re.MULTILINE)


class ChatTemplate:
    """A model's own chat template, rendered as in `so8t verify`, in a child process, with today's date.

    Raises:
        InputError: the source is no Jinja template.
    """

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        self._template, self._bos, self._eos = chat_template.ChatTemplate(source), bos, eos
        if self._template.error():
            raise InputError("the GGUF's chat template is not valid Jinja; `so8t convert` writes the base's own")

    def render(self, messages: list[Message], *, prompt: bool = True) -> str:
        """The conversation as text, with `prompt` up to the model's turn.

        As in training: contents are texts; if the template loses a text, they are parts; if it refuses the system role,
        the system text stands in front of the first question.

        Raises:
            Refusal: the template refuses these roles, or cannot render them.
        """
        first = self._one(messages, prompt)
        if first is not None and all(message["content"] in first for message in messages):
            return first
        parts = self._one(as_parts(messages), prompt)
        if parts is not None and all(message["content"] in parts for message in messages):
            return parts
        found = first if first is not None else self._one(without_system(messages), prompt)
        if found is None:
            raise invalid("the model's chat template refuses this order of roles", param="messages")
        return found

    def _one(self, messages: list[Message], prompt: bool) -> str | None:
        """One way of rendering; None where the template refuses it."""
        variables = chat_template.llama_cpp_variables(messages, bos=self._bos, eos=self._eos, prompt=prompt)
        (outcome,) = self._template.render(variables, now=datetime.datetime.now())
        return outcome.text if outcome.kind == "text" else None

    def close(self) -> None:
        """End the child process."""
        self._template.close()


class LlamaEngine:
    """One loaded file; see `pipeline.serve.engine.Engine`.

    Args:
        n_ctx: tokens of prompt and generation together; None = as shipped.
        max_new_tokens: a longer generation is stopped, and none of it is shown.
        form: the model's form of thinking; None = the form that the file names.

    Raises:
        InputError: the file cannot be loaded, has no chat template, or the limits contradict each other.
    """

    quick = False

    def __init__(
        self,
        gguf: Path,
        *,
        n_ctx: int | None = None,
        max_new_tokens: int = 1024,
        threads: int | None = None,
        form: Form | None = None,
    ) -> None:
        if not gguf.exists():
            raise InputError(f"{gguf} does not exist; `so8t convert` makes GGUF files")
        file = read_gguf(gguf)
        require_logits(file)
        gguf = file.path  # for a set of shards, the first
        self.model_id, self.digest = file.stem, f"sha256:{file.digest}"
        self.max_new_tokens = max_new_tokens
        require_loadable(gguf)  # a damaged file can end the process that opens it
        self.model = LlamaModel(gguf)
        self.tokens = Tokens(self.model)
        trained = int(llama_cpp.llama_model_n_ctx_train(self.model.model))
        limit = limit_of_file(file) or trained
        if n_ctx is not None and limit < min(n_ctx, trained):
            raise InputError(
                f"--n-ctx {n_ctx} is above {limit}, the original length of this model's LongRoPE: llama.cpp would take "
                f"the long factors for short conversations too; give {limit} or less"
            )
        self.n_ctx = min(n_ctx or shipped_n_ctx(gguf), trained, limit)
        source = self.model.chat_template()
        if source is None:
            raise InputError(f"{gguf} has no chat template, so it cannot hold a conversation; convert it again")
        if max_new_tokens >= self.n_ctx:
            raise InputError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in {self.n_ctx} tokens")
        names = {"bos": self.model.token_text(self.model.bos), "eos": self.model.token_text(self.model.eos)}
        self.template = ChatTemplate(source, **names)
        self.form = form or form_of_file(file, source)
        self.marks = {ids[0] for marker in self.form.markers if len(ids := self.model.tokenize(marker)) == 1}
        self.ends = self._ends(gguf)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = self.n_ctx, 1
        params.n_batch = params.n_ubatch = PIECE
        params.n_threads = params.n_threads_batch = threads or usable_cores()
        self.context = llama_cpp.llama_init_from_model(self.model.model, params)
        if not self.context:
            raise InputError(f"llama.cpp cannot open a context of {self.n_ctx} tokens: {last_words()}")
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llama")

    def _ends(self, gguf: Path) -> set[int]:
        """Control tokens that end a turn: the Modelfile's stops, and the first one that the template writes behind an
        answer."""
        found = [self.model.tokenize(stop) for stop in shipped_stops(gguf)]
        ends = {ids[0] for ids in found if len(ids) == 1}
        answer = "answer seven"
        try:
            question = {"role": "user", "content": "question"}
            text = self.template.render([question, {"role": "assistant", "content": answer}], prompt=False)
        except Refusal:
            text = ""
        behind = self.model.tokenize(text.rpartition(answer)[2]) if answer in text else []
        ends.update(next(([token] for token in behind if self.tokens.is_control(token)), []))
        return {token for token in ends if self.tokens.is_control(token)} - self.marks

    def prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of the rendered conversation."""
        return with_bos(self.model, self.model.tokenize(self.template.render(messages)))

    def check(self, messages: list[Message]) -> int:
        """Tokens of the prompt; refuses control tokens and prompts that leave no room to answer."""
        self.tokens.refuse_control(messages)
        found, room = len(self.prompt(messages)), self.n_ctx - self.max_new_tokens
        if found > room:
            raise invalid(
                f"the conversation has {found} tokens, at most {room} are possible: shorten it",
                param="messages",
                code="context_length_exceeded",
            )
        return found

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return self.tokens.count(text)

    def cut(self, text: str, limit: int) -> str:
        """The text's first `limit` tokens."""
        return self.tokens.cut(text, limit)

    async def generate(self, job: Job, feed: Feed) -> str | None:
        """Wait for this job's turn, then decode in a thread; ends within one piece of work when cancelled."""
        async with self._turn:
            cancelled = threading.Event()
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._decode, job, feed, cancelled)
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                cancelled.set()
                await asyncio.wait([work])  # there is one context, which must be idle for the next turn
                work.exception()  # reads it, so that asyncio does not log it
                raise

    def _decode(self, job: Job, feed: Feed, cancelled: threading.Event) -> str | None:
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, True)
        sampler = _sampler(job)
        try:
            ids = self.prompt(job.messages)
            for start in range(0, len(ids), PIECE):
                if cancelled.is_set():
                    return None
                self._step(ids[start : start + PIECE])
            for _ in range(self.max_new_tokens):
                if cancelled.is_set():
                    return None
                token = int(llama_cpp.llama_sampler_sample(sampler, self.context, -1))
                if self.model.is_end(token) or token in self.ends:
                    return "stop"
                if self.tokens.is_control(token) and token not in self.marks:
                    raise EngineError("control token")
                feed(self.tokens.piece(token))
                self._step([token])
            return "length"
        finally:
            llama_cpp.llama_sampler_free(sampler)
            llama_cpp.llama_memory_clear(memory, True)  # no thinking stays in memory

    def _step(self, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)  # the batch holds only a pointer to it
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids))) != 0:
            raise EngineError("llama.cpp failed")

    async def close(self) -> None:
        """Wait for the running turn, then free context and model."""
        async with self._turn:
            self._thread.shutdown()
            llama_cpp.llama_free(self.context)
            self.model.close()
            self.template.close()


def _sampler(job: Job) -> Any:
    """llama.cpp's sampler: the likeliest token at temperature 0, else top-p and temperature with a seed."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    if job.temperature == 0:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
        return chain
    seed = llama_cpp.LLAMA_DEFAULT_SEED if job.seed is None else job.seed  # the default means a new seed each time
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_p(job.top_p, 1))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(job.temperature))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))
    return chain
