"""`longscan serve`: a model over HTTP, for OpenAI's clients."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from longscan.checkpoints.load import load_with_tokenizer
from longscan.commands._adapters import Adapters, load_adapters, size_of
from longscan.commands._options import (
    Offline,
    PrecisionOption,
    Quiet,
    Revision,
    Threads,
    TokenizerName,
)
from longscan.core.checks import check_whole
from longscan.core.files import utf8
from longscan.core.optional import require
from longscan.core.runtime import use_threads
from longscan.errors import LongscanError, UsageError
from longscan.models.common.summary import describe
from longscan.ops import keep_memory
from longscan.tokenizers.chat import find_template

__all__ = ["command"]


def command(
    model: Annotated[
        str, typer.Option(help="A shipped model, a directory, a .gguf file, or a hub id.")
    ] = "longscan-tiny-en",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Model name that clients see; default: --model's.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Chat template: a name, or a Jinja file; default: the model's own.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Texts of a model that decode at a time.")] = 8,
    queue: Annotated[int, typer.Option(help="Requests that may wait; others get 429.")] = 64,
    connections: Annotated[int, typer.Option(help="Connections at a time; others get 503.")] = 1024,
    max_length: Annotated[int, typer.Option(help="Tokens of a text, prompt and answer together.")] = 32768,
    cache_mb: Annotated[int, typer.Option(help="MB of states of conversations, and of prefixes.")] = 256,
    state_dir: Annotated[
        Path | None,
        typer.Option("--state-dir", help="Directory for states that clients save; default: they may not."),
    ] = None,
    state_mb: Annotated[
        int, typer.Option("--state-mb", help="MB of --state-dir; a save beyond fails.")
    ] = 1024,
    deadline: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    drain: Annotated[float, typer.Option(help="Seconds for running texts after the first SIGTERM.")] = 10.0,
    api_keys: Annotated[
        Path | None,
        typer.Option("--api-keys", help="File with API keys, one per line; or one in $LONGSCAN_API_KEY."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web page that may send requests, such as http://localhost:3000; repeatable."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Name in the Host header, beside --host; repeatable.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without an API key.")
    ] = False,
    precision: PrecisionOption = None,
    tokenizer_name: TokenizerName = None,
    adapter: Adapters = None,
    threads: Threads = None,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Serve a language model over HTTP, in the form that OpenAI's clients speak.

    /v1/completions and /v1/chat/completions (streaming, n, stop, seed, logprobs, echo, JSON schemas, tools),
    /v1/embeddings, /v1/models, /tokenize, /detokenize, /health and /metrics. Requests run as one batch; the
    second turn of a conversation prefills only what is new. At / there is a page to chat, and to see what the
    model does inside. With adapters the server has several models on the same weights: the field
    `model` of a request chooses one. Ctrl-C or SIGTERM lets running texts end first.

    Raises:
        UsageError: a flag has an invalid value.
        LongscanError: the model can't be read, or the port is in use.
    """
    require("fastapi", "servers")
    require("uvicorn", "servers")
    require("llguidance", "servers")
    from longscan.serve.guard import LOOPBACK, Access
    from longscan.serve.limits import Limits
    from longscan.serve.run import bind, serve
    from longscan.serve.served import serve_adapters
    from longscan.serve.states import StateStore

    for flag, value, least in (
        ("--slots", slots, 1),
        ("--queue", queue, 0),
        ("--connections", connections, 1),
        ("--max-length", max_length, 2),
        ("--cache-mb", cache_mb, 0),
        ("--state-mb", state_mb, 1),
        ("--port", port, 0),
    ):
        check_whole(flag, value, least)
    if port > 65535 or slots > 256:
        raise UsageError(f"--port, --slots: expected at most 65535 and 256, got {port} and {slots}.")
    if not 0 < deadline < math.inf or not 0 <= drain < math.inf:
        raise UsageError(f"--deadline, --drain: expected seconds, got {deadline} and {drain}.")
    keys = _keys(api_keys)
    if host not in LOOPBACK and not keys and not insecure:
        raise UsageError(
            f"--host {host}: others could use this server without a key. "
            "Set $LONGSCAN_API_KEY or --api-keys, or add --insecure."
        )
    use_threads(threads)
    keep_memory()
    with bind(host, port) as listener, contextlib.ExitStack() as opened:
        network, tokenizer = load_with_tokenizer(model, revision, offline, precision, tokenizer_name)
        limits = Limits(slots, queue, max_length, deadline, cache_mb << 20, connections=connections)
        shown = name or (Path(model).name if Path(model).exists() else model)
        adapters = load_adapters(network, tokenizer, adapter, shown)
        served = serve_adapters(
            (network, tokenizer, find_template(tokenizer, template)),
            shown,
            {its: (*pair, find_template(pair[1], template)) for its, pair in adapters.items()},
            limits,
            opened.enter_context(StateStore.open(state_dir, state_mb << 20)) if state_dir else None,
        )
        hosts = (*LOOPBACK, *(allow_host or ())) if host in LOOPBACK or allow_host else ()
        origins = tuple(origin.rstrip("/").lower() for origin in allow_origin or ())
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
        if not quiet:
            logging.getLogger("longscan.serve").setLevel(logging.INFO)
        url = _url(listener, host)

        def started() -> None:
            if not quiet:
                typer.echo(describe(model, network), err=True)
                if adapters:
                    typer.echo(f"adapters {size_of(adapters)}", err=True)
                typer.echo(_hint(url, served.usual.name, bool(keys)), err=True)

        serve(served, listener, Access(keys, hosts, origins), drain=drain, started=started)


def _keys(path: Path | None) -> tuple[str, ...]:
    """Return the API keys of a file and of the environment."""
    lines = [] if path is None else utf8(path.read_bytes(), str(path)).splitlines()
    keys = [key for key in map(str.strip, [*lines, os.environ.get("LONGSCAN_API_KEY", "")]) if key]
    if path is not None and not keys:
        raise LongscanError(f"{path}: expected API keys, one per line, got none.")
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise LongscanError("an API key: expected printable ASCII without spaces.")
    return tuple(keys)


def _url(listener: socket.socket, host: str) -> str:
    """Return the address of the server."""
    port, host = listener.getsockname()[1], {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _hint(url: str, name: str, keyed: bool) -> str:
    """Return what to do now."""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}], "stream": true}}'
    key = '-H "Authorization: Bearer $LONGSCAN_API_KEY" ' if keyed else ""
    return (
        f"▏ serving {name} at {url}/v1, with a page at {url}/ · Ctrl-C ends it\n"
        f"▏ try: curl -N {url}/v1/chat/completions {key}-d '{body}'"
    )
