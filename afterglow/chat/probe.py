"""What a model server tells about itself and one of its models: which kind it is, and the context window.

Each kind has its own way to say it; all are asked at once, and what a server does not know it answers with an error.
Reading the answers is pure; the one that asks is `ask_server`, through a function that it is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from msgspec import Struct

Kind = Literal["", "vllm", "llama.cpp", "ollama", "lm-studio"]
# Method, path from the server's root, JSON body; returns the decoded answer, or None for anything but a 200.
Ask = Callable[[str, str, Any], Awaitable[Any]]

# What Ollama gives a model whose num_ctx nobody set. It cuts longer prompts silently, so more must not be assumed.
OLLAMA_WINDOW_TOKENS = 4096


class ServerWords(Struct, frozen=True, kw_only=True):
    """What a server says of a model; None where it says nothing. guessed: worth asking again soon."""

    kind: Kind = ""
    window_tokens: int | None = None
    vision: bool | None = None
    tools: bool | None = None
    guessed: bool = False


async def ask_server(ask: Ask, model: str) -> ServerWords | None:
    """Ask in every dialect at once; None when the server speaks none of them."""
    props, show, running, lm_studio = await asyncio.gather(
        ask("GET", "/props", None),
        ask("POST", "/api/show", {"model": model}),
        ask("GET", "/api/ps", None),
        ask("GET", "/api/v0/models", None),
    )
    return (
        read_llama_cpp(_dict(props))
        or read_ollama(_dict(show), _dict(running), model)
        or read_lm_studio(_dict(lm_studio), model)
    )


def read_llama_cpp(props: dict[str, Any]) -> ServerWords | None:
    """llama.cpp's `/props`: `n_ctx` there is what one request may use."""
    settings = _dict(props.get("default_generation_settings"))
    if not settings:
        return None
    vision = _dict(props.get("modalities")).get("vision")
    return ServerWords(
        kind="llama.cpp",
        window_tokens=_tokens(settings.get("n_ctx")) or _tokens(props.get("n_ctx")),
        vision=vision if isinstance(vision, bool) else None,
    )


def read_ollama(show: dict[str, Any], running: dict[str, Any], model: str) -> ServerWords | None:
    """Ollama's `/api/show` and `/api/ps`. The window is `num_ctx`, if the model's file sets it; else what the loaded
    model got; else Ollama's default, as long as the model itself can do as much."""
    about = _dict(show.get("model_info"))
    if not about:
        return None
    largest = next((_tokens(value) for key, value in about.items() if key.endswith(".context_length")), None)
    known = _num_ctx(show.get("parameters")) or _running_window(running, model)
    can = show.get("capabilities")
    return ServerWords(
        kind="ollama",
        window_tokens=known or min(largest or OLLAMA_WINDOW_TOKENS, OLLAMA_WINDOW_TOKENS),
        vision="vision" in can if isinstance(can, list) else None,
        tools="tools" in can if isinstance(can, list) else None,
        guessed=not known,
    )


def _num_ctx(parameters: Any) -> int | None:
    for line in parameters.splitlines() if isinstance(parameters, str) else ():
        name, _, value = line.strip().partition(" ")
        if name == "num_ctx" and value.strip().isdecimal():
            return int(value)
    return None


def _running_window(running: dict[str, Any], model: str) -> int | None:
    for loaded in _dicts(running.get("models")):
        if loaded.get("name") in (model, f"{model}:latest"):
            return _tokens(loaded.get("context_length"))
    return None


def read_lm_studio(listing: dict[str, Any], model: str) -> ServerWords | None:
    """LM Studio's own model list. A model that is not loaded has only its largest window."""
    for entry in _dicts(listing.get("data")):
        if entry.get("id") == model:
            loaded = _tokens(entry.get("loaded_context_length"))
            return ServerWords(
                kind="lm-studio",
                window_tokens=loaded or _tokens(entry.get("max_context_length")),
                vision=entry.get("type") == "vlm" if entry.get("type") in ("vlm", "llm") else None,
                guessed=not loaded,
            )
    return None


def read_entry(entry: dict[str, Any]) -> ServerWords:
    """What an object of `/v1/models` says: vLLM, llama.cpp; OpenRouter and Together, Groq, Mistral, Anthropic."""
    meta = _dict(entry.get("meta"))
    kinds: dict[Any, Kind] = {"vllm": "vllm", "llamacpp": "llama.cpp", "library": "ollama"}
    found = (
        entry.get("max_model_len"),
        meta.get("n_ctx"),
        entry.get("context_length"),
        entry.get("context_window"),
        entry.get("max_context_length"),
        entry.get("max_input_tokens"),
    )
    window = next((tokens for value in found if (tokens := _tokens(value))), None)
    return ServerWords(kind=kinds.get(entry.get("owned_by"), ""), window_tokens=window)


def _tokens(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
