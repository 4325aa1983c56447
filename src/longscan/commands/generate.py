"""`longscan generate`: continue texts, token by token."""

from __future__ import annotations

import json
import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from longscan.checkpoints.load import load, load_with_tokenizer
from longscan.commands._adapters import NONE, Adapters, load_adapters, only, size_of
from longscan.commands._input import read_constraint, read_prompts, sampling_config
from longscan.commands._options import (
    Json,
    JsonSchemaFile,
    MinP,
    Offline,
    PrecisionOption,
    Quiet,
    Regex,
    RepetitionPenalty,
    Revision,
    SamplingSeed,
    Temperature,
    Threads,
    TokenizerName,
    TopK,
    TopP,
)
from longscan.commands._session import Session
from longscan.core.files import utf8
from longscan.core.runtime import use_threads
from longscan.errors import LongscanError, UsageError
from longscan.inference.drafters import Drafter, DraftModel, PromptLookup
from longscan.inference.engine import MAX_SLOTS, Engine
from longscan.inference.prefill import encode
from longscan.inference.request import make_requests
from longscan.models import LanguageModel, State
from longscan.models.common.state import SavedState
from longscan.models.common.summary import describe
from longscan.tokenizers.base import Tokenizer

__all__ = ["command"]


def command(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Texts to continue; - or a pipe: one from stdin."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompts", help='Read prompts from a file: one per line, or .jsonl with "prompt".'),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A shipped model, a directory, or a hub id.")
    ] = "longscan-tiny-en",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop string: end before it; repeatable. A line break is $'\\n'."),
    ] = None,
    seed: SamplingSeed = None,
    precision: PrecisionOption = None,
    tokenizer_name: TokenizerName = None,
    adapter: Adapters = None,
    load_state: Annotated[
        Path | None, typer.Option(help="Continue from a state file; PROMPT is appended to its text.")
    ] = None,
    save_state: Annotated[Path | None, typer.Option(help="Save the final state to a file.")] = None,
    json_schema: JsonSchemaFile = None,
    regex: Regex = None,
    speculate: Annotated[
        bool,
        typer.Option("--speculate", help="Speculative decoding by prompt lookup; the text stays the same."),
    ] = False,
    draft: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Speculative decoding with a draft model; likewise."),
    ] = None,
    threads: Threads = None,
    revision: Revision = None,
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text with a language model, token by token.

    One PROMPT is streamed as it is generated; several, or those of a file, run as one batch and are printed
    in order, each when it is complete. A prompt from stdin loses its last line break. The file of --prompts
    is UTF-8, also .gz or .xz; its blank lines are skipped. Without any prompt the model starts a new text, or
    continues the one of --load-state. With several --adapter each of them continues each prompt, beside the
    weights of one base, and its name stands above its text; a single one is merged.

    Raises:
        UsageError: a flag has an invalid value.
        LongscanError: the model or the prompt can't be read.
    """
    config = sampling_config(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or [],
        seed=secrets.randbelow(10**6) if seed is None else seed,
    )
    use_threads(threads)
    if prompt_file is not None and prompts:
        raise UsageError("PROMPT and --prompts: expected one of them, got both.")
    texts = _prompts(prompts or []) if prompt_file is None else read_prompts(prompt_file)
    _check_usage(texts, save_state, (speculate, draft), (json_schema, regex))
    if adapter and len(adapter) > 1 and (load_state or save_state or speculate or draft):
        raise UsageError(
            "--adapter: expected one beside --load-state, --save-state, --speculate and --draft, "
            f"got {len(adapter)}: a state and a draft are of one model."
        )
    merged = only(adapter)
    network, tokenizer = load_with_tokenizer(model, revision, offline, precision, tokenizer_name, merged)
    adapted = {} if merged else load_adapters(network, tokenizer, adapter, NONE)
    before = None if load_state is None else _load_state(load_state, network, texts)
    drafter = PromptLookup() if speculate else _draft_model(draft, tokenizer, offline) if draft else None
    ids = encode(tokenizer, texts, begins=before is None)
    stream = len(texts) == 1 and not as_json and prompt_file is None and not adapted
    session = Session(texts, list(adapted), stream=stream, silent=as_json)
    requests = list(make_requests(ids, config, tokenizer.eos_ids, before, keep=save_state is not None))
    constraint = read_constraint(tokenizer, json_schema, regex)
    if not quiet:
        summary = describe(model, network) + (f" · {size_of(adapted)}" if adapted else "")
        typer.echo(summary + "\n", err=True)
    slots = min(len(texts), MAX_SLOTS)
    try:
        for i, (one, own) in enumerate(adapted.values() or [(network, tokenizer)]):
            engine = Engine(one, own, slots=slots, drafter=drafter, progress=session.show_prefill)
            for request in requests:
                engine.submit(replace(request, constraint=constraint))
            session.run(engine, config.max_new_tokens, i * len(texts))
            if session.stopped:
                break
    finally:
        session.close()
    saved = save_state if session.consistent else None
    if saved is not None:
        _save_state(saved, engine, network)
    if as_json:
        counts = {"model": model, "seed": config.seed, "prompt_tokens": sum(map(len, ids))}
        speculation = {"drafted": engine.drafted, "accepted": engine.accepted} if drafter else {}
        typer.echo(json.dumps({**counts, **session.report(), **speculation}, ensure_ascii=False, indent=2))
    if not quiet:
        typer.echo(session.footer(config, saved), err=True)
    if save_state is not None and saved is None:
        raise LongscanError(f"stopped before the prompt was processed: {save_state} was not written.")
    if session.stopped:
        raise typer.Exit(130)


def _save_state(path: Path, engine: Engine, model: LanguageModel) -> None:
    """Write the state of the only text to a file."""
    after = engine.saved(0)
    after.state.save(path, position=after.position, pending=after.pending, model=model)


def _check_usage(
    texts: list[str], save_state: Path | None, drafts: tuple[bool, Any], grammars: tuple[Any, Any]
) -> None:
    """Raise an error for flags that contradict each other, before anything slow starts."""
    if all(drafts):
        raise UsageError("--speculate and --draft: expected one of them, got both.")
    if None not in grammars:
        raise UsageError("--json-schema and --regex: expected one of them, got both.")
    if save_state is not None and len(texts) > 1:
        raise UsageError(f"--save-state: expected one prompt, got {len(texts):,}.")
    if save_state is not None and (save_state.is_dir() or not save_state.absolute().parent.is_dir()):
        raise LongscanError(f"{save_state}: expected a new or another file, in a directory that exists.")


def _load_state(path: Path, model: LanguageModel, texts: list[str]) -> SavedState:
    """Return the state that the texts continue."""
    saved = State.load(path, model)
    if saved.state.batch_size != 1:
        raise LongscanError(f"{path} holds {saved.state.batch_size} states: expected one. See state.select.")
    if not saved.pending and not all(texts):
        raise LongscanError(f"{path} has no pending token to continue from: give a prompt.")
    return saved


def _draft_model(name: str, tokenizer: Tokenizer, offline: bool) -> Drafter:
    """Return a drafter for a model with this tokenizer; a draft model without one is trusted to have it."""
    network, other = load(name, offline=offline)
    if other is not None and other.fingerprint != tokenizer.fingerprint:
        raise LongscanError(
            f"the draft model {name} has another tokenizer than the model, so its ids mean other text. "
            "Expected a smaller model that was trained with the same tokenizer."
        )
    return DraftModel(network)


def _prompts(given: list[str]) -> list[str]:
    """Return the prompts of the command line, with that of stdin in place of -."""
    if not given and sys.stdin is not None and not sys.stdin.isatty():
        given = ["-"]
    piped = ""
    if "-" in given:
        piped = utf8(sys.stdin.buffer.read(), "the prompt on stdin").removeprefix("\ufeff")
        piped = piped.removesuffix("\n").removesuffix("\r")
    # Python passes bytes that are not UTF-8 on as lone surrogates
    return [
        piped if text == "-" else utf8(text.encode(errors="surrogateescape"), "the prompt")
        for text in given or [""]
    ]
