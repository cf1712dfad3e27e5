"""The verbs of the server: `so8t serve` and `so8t audit`.

Heavy imports happen inside the verbs, so that help and a mistyped path answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline.cli.saying import say
from so8t_core.errors import InputError


def serve(
    model: Annotated[
        Path | None, typer.Option(metavar="FILE.gguf", help="answer with this file, in this process")
    ] = None,
    upstream: Annotated[
        str | None, typer.Option(metavar="URL", help="server that answers: llama-server, vLLM, Ollama")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="name of the model for clients and upstream")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="F", help="GGUF or folder: counts tokens, tells the form")
    ] = None,
    allow_remote_upstream: Annotated[
        bool, typer.Option("--allow-remote-upstream", help="accept that the thinking crosses a network")
    ] = False,
    think_form: Annotated[
        str | None, typer.Option(metavar="FORM", help="so8t, think, harmony, separated or 'A...B'")
    ] = None,
    host: Annotated[str, typer.Option(metavar="NAME", help="not loopback: needs --keys")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 takes any free port", min=0, max=65535)] = 8080,
    keys: Annotated[Path | None, typer.Option(metavar="FILE", help="API keys, stored as hashes")] = None,
    new_key: Annotated[str | None, typer.Option(metavar="NAME", help="add a key to --keys, print it, and end")] = None,
    operator: Annotated[bool, typer.Option("--operator", help="the new key sees reasons of refusals")] = False,
    audit_log: Annotated[Path, typer.Option(metavar="FILE", help="log, only appended to")] = Path("so8t-audit.jsonl"),
    audit_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="key of the log; default: $SO8T_AUDIT_KEY")
    ] = None,
    copy_run: Annotated[int, typer.Option(metavar="N", min=32, help="N letters in a row are a copy")] = 32,
    n_ctx: Annotated[int | None, typer.Option(metavar="N", min=256, help="context; default: as shipped")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="thinking and answer together")] = 1024,
    queue: Annotated[int, typer.Option(metavar="N", min=0, help="requests that may wait")] = 8,
    per_key: Annotated[int, typer.Option(metavar="N", min=1, help="requests of one key at once")] = 4,
    timeout: Annotated[float, typer.Option(metavar="S", min=0.1, help="seconds for one request")] = 300.0,
    keep_alive: Annotated[float, typer.Option(metavar="S", min=0.1, help="seconds between signs of life")] = 10.0,
    empty_chunks: Annotated[bool, typer.Option("--empty-chunks", help="signs of life as empty chunks")] = False,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads; default: all cores")] = None,
) -> None:
    """Serve answers, withhold the thinking.

    The server has the API of OpenAI's chat completions; see docs/server.md.
    \f
    Raises:
        InputError: it cannot start, or --new-key has no --keys. (What follows the form feed is not in the help.)
    """
    if new_key is not None:
        from pipeline.serve.keys import new_api_key

        if keys is None:
            raise InputError("--new-key needs the file that the key is added to; give --keys FILE")
        say(new_api_key(keys, new_key, operator=operator) + "\n")
        return
    from pipeline.serve.start import ServeConfig
    from pipeline.serve.start import serve as run_server

    config = ServeConfig(
        model=model,
        upstream=upstream,
        name=name,
        tokenizer=tokenizer,
        allow_remote_upstream=allow_remote_upstream,
        think_form=think_form,
        copy_run=copy_run,
        empty_chunks=empty_chunks,
        host=host,
        port=port,
        keys=keys,
        audit_log=audit_log,
        audit_key_file=audit_key_file,
        n_ctx=n_ctx,
        max_new_tokens=max_new_tokens,
        queue=queue,
        per_key=per_key,
        timeout=timeout,
        keep_alive=keep_alive,
        threads=threads,
    )
    run_server(config, announce=lambda line: print(f"so8t serve: {line}", flush=True))


audit_app = typer.Typer(
    help="Examine the server's audit log.",
    epilog="Example: so8t audit verify so8t-audit.jsonl",
    rich_markup_mode=None,
    no_args_is_help=True,
)


@audit_app.callback(epilog="Example: so8t audit verify so8t-audit.jsonl")
def audit() -> None:
    """Examine the server's audit log."""


@audit_app.command("verify", epilog="Example: so8t audit verify so8t-audit.jsonl --expect-head 41:9f86...")
def audit_verify(
    log: Annotated[Path, typer.Argument(metavar="LOG", show_default=False)],
    expect_head: Annotated[
        str | None, typer.Option(metavar="SEQ:SHA256", help="a head that you kept; the log must still contain it")
    ] = None,
) -> None:
    """Check that no line of the log was changed.

    Exit code 1: a line was edited, moved, cut or removed. Keep the printed head in another place: only this head shows
    that somebody removed the last lines and changed the head file as well.
    """
    from pipeline.serve.audit_log import Head, Tampered
    from pipeline.serve.audit_log import verify as verify_log

    try:
        head = verify_log(log, expect=Head.parse(expect_head) if expect_head else None)
    except Tampered as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"so8t: {log}: {error}", markup=False)
        raise typer.Exit(1) from None
    say(f"{log}: {head.seq + 1} records, unbroken; head {head}\n")
