"""The bodies of requests, checked: types, ranges, sizes. Unknown fields are ignored, as clients send many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from longscan.inference.sampling import SamplingConfig
from longscan.serve.formats import (
    MAX_TOOLS,
    NamedTool,
    ResponseFormat,
    ToolBody,
    UnsupportedError,
    calling_messages,
    choose,
)

__all__ = [
    "NAME",
    "ChatBody",
    "CompletionBody",
    "DetokenizeBody",
    "EmbeddingBody",
    "TokenizeBody",
    "plain_messages",
]

MAX_TOKENS = 2**31 - 1
NAME = "[A-Za-z0-9_-]{1,64}"  # of a state
MAX_BATCH = 64  # prompts
MAX_TEXTS = 256  # to embed

Float: TypeAlias = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Int: TypeAlias = Annotated[int, Field(strict=True)]
Flag: TypeAlias = Annotated[bool, Field(strict=True)]
Str: TypeAlias = Annotated[str, Field(strict=True)]
Text: TypeAlias = Annotated[str, Field(strict=True, min_length=1)]
Id: TypeAlias = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Biases: TypeAlias = Annotated[dict[str, Annotated[Float, Field(ge=-100, le=100)]], Field(max_length=300)]
StateName: TypeAlias = Annotated[str, Field(strict=True, pattern=rf"\A{NAME}\z")]
StopString: TypeAlias = Annotated[str, Field(strict=True, min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    """What a stream contains beside the text."""

    include_usage: Flag = False


class _Sampled(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: Str | None = None
    temperature: Annotated[Float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[Float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[Float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[Float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[Float, Field(ge=-100, le=100)]], Field(max_length=300)] | None
    ) = None
    n: Annotated[Int, Field(ge=1, le=8)] | None = None
    seed: Annotated[Int, Field(ge=0, lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: Flag | None = None
    response_format: ResponseFormat | None = None
    load_state: StateName | None = None
    save_state: StateName | None = None

    @model_validator(mode="after")
    def _check_state(self) -> Self:
        if self.save_state is not None and self.choices > 1:
            raise UnsupportedError("save_state", "save_state: expected n to be 1 with it.")
        return self

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        if self.ignore_eos and self.form is not None:
            raise UnsupportedError("ignore_eos", "ignore_eos: expected no response_format with it.")
        return self

    @property
    def form(self) -> ResponseFormat | None:
        """What the text must look like; None for any text."""
        form = self.response_format
        return None if form is None or form.type == "text" else form

    @property
    def choices(self) -> int:
        """The number of continuations of a prompt."""
        return self.n or 1

    @property
    def biases(self) -> dict[int, float]:
        """The logit biases by token id.

        Raises:
            UnsupportedError: a key is no token id.
        """
        biases = {}
        for key, bias in (self.logit_bias or {}).items():
            if not key.isascii() or not key.isdigit() or len(key) > 10:
                raise UnsupportedError(
                    "logit_bias", f"logit_bias: expected token ids as keys, got {key[:40]!r}."
                )
            biases[int(key)] = bias
        return biases

    def sampling(self, max_new_tokens: int, logprobs: int | None, seed: int) -> SamplingConfig:
        """Return the sampling settings; what is not given is as OpenAI has it.

        Args:
            max_new_tokens: of each continuation.
            logprobs: see `SamplingConfig`.
            seed: if the body has none.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingConfig(
            max_new_tokens=max_new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logprobs=logprobs,
            stop=stop,
            seed=seed if self.seed is None else self.seed,
        )


class CompletionBody(_Sampled):
    """POST /v1/completions."""

    prompt: (
        Str
        | Annotated[list[Id], Field(min_length=1)]
        | Annotated[list[Str], Field(min_length=1, max_length=MAX_BATCH)]
        | Annotated[list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=1, max_length=MAX_BATCH)]
    )
    logprobs: Annotated[Int, Field(ge=0, le=5)] | None = None
    echo: Flag | None = None
    suffix: Str | None = None
    best_of: Int | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.suffix:
            raise UnsupportedError("suffix", "suffix: this server does not fill in the middle of a text.")
        if self.best_of not in (None, self.choices):
            raise UnsupportedError("best_of", "best_of: expected n, or nothing.")
        if self.max_tokens == 0 and not (self.echo or self.save_state):
            raise UnsupportedError(
                "max_tokens", "max_tokens: expected at least 1; 0 is for echo and save_state."
            )
        for field in ("load_state", "save_state"):
            if getattr(self, field) is not None and (self.echo or len(self.prompts) > 1):
                raise UnsupportedError(field, f"{field}: expected one prompt, without echo.")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or ids."""
        return _listed(self.prompt)


def _listed(given: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """Return one or several texts, each text or ids, as a list."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return list(given)


class ChatBody(_Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[Int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolBody], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Flag | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise UnsupportedError("tool_choice", "tool_choice: expected tools to choose from.")
        if self.tools:
            choose(self.tools, self.tool_choice)
            if self.ignore_eos:
                raise UnsupportedError("ignore_eos", "ignore_eos: expected no tools with it.")
        if self.top_logprobs and not self.logprobs:
            raise UnsupportedError("top_logprobs", "top_logprobs: expected logprobs to be true with it.")
        if self.max_tokens == 0:
            raise UnsupportedError("max_tokens", "max_tokens: expected at least 1.")
        fixed = {
            "messages",
            "tools",
            "prompt",
            "add_generation_prompt",
            "bos_token",
            "eos_token",
            "tokenizer",
            "self",
        }
        if fixed & set(self.chat_template_kwargs or {}):
            raise UnsupportedError(
                "chat_template_kwargs", f"chat_template_kwargs: {sorted(fixed)} are set already."
            )
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """The bound on the answer, if there is one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def plain_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with their parts of text joined, and today's name of the system.

    Args:
        messages: of a chat.

    Raises:
        UnsupportedError: a part is no text.
    """
    plain = []
    for given in calling_messages(messages):
        message, content, role = given, given.get("content"), given.get("role")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise UnsupportedError(
                    "messages", "messages: expected text alone; this model sees no images."
                )
            message = {**message, "content": "".join(map(str, parts))}
        elif content is None and role == "assistant":  # of one that calls tools; templates expect text
            message = {**message, "content": ""}
        if role == "developer":
            message = {**message, "role": "system"}
        plain.append(message)
    return plain


class EmbeddingBody(BaseModel):
    """POST /v1/embeddings."""

    model: Str | None = None
    input: (
        Text
        | Annotated[list[Id], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
        | Annotated[list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=1, max_length=MAX_TEXTS)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[Int, Field(ge=1, lt=2**31)] | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        """The texts, each text or ids."""
        return _listed(self.input)


class TokenizeBody(BaseModel):
    """POST /tokenize: a prompt or messages."""

    model: Str | None = None
    prompt: Str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1000)] | None = None
    tools: Annotated[list[ToolBody], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: Flag = True
    add_generation_prompt: Flag = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise UnsupportedError("prompt", "expected a prompt or messages, one of them.")
        return self


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    tokens: list[Id]
