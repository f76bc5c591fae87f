"""The section `engines` of a recipe: servers that may answer, and what each is asked with.

A key never stands in a recipe: `api_key_env` names the environment variable that holds it. A key or a password that
was written into a recipe all the same is refused without being shown.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rlaif.errors import ConfigError

BASE = "base"  # the name of the recipe's own model, where a recipe says who answers
RAY = "ray"  # the same model in workers of a Ray cluster
_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_OURS = {
    *("max_completion_tokens", "max_tokens", "messages", "model", "n", "seed", "stop", "stream"),
    *("logprobs", "temperature", "tools", "top_logprobs", "top_p"),
}
_LOCAL = {"localhost", "127.0.0.1", "::1"}


class Endpoint(BaseModel):
    """One model behind servers that speak OpenAI's chat completions."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, description="the name by which the server knows it")
    urls: list[str] = Field(min_length=1, description="base addresses, such as http://127.0.0.1:8000/v1")
    api_key_env: str | None = Field(None, description="name of the environment variable that holds the key")
    concurrency: int = Field(16, ge=1, le=1024, description="requests under way at a time, over all urls")
    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(120.0, description="for one attempt")
    max_retries: int = Field(6, ge=0, le=100, description="further attempts at a question")
    max_response_bytes: int = Field(4194304, gt=0)
    logprobs: Literal["auto", "required", "off"] = Field("auto", description="how a choice is read")
    top_logprobs: int = Field(20, ge=2, le=100, description="how many log-probabilities to ask for")
    extra_body: dict[str, Any] = Field({}, description="further keys of each request, such as chat_template_kwargs")

    # Looks at the whole section, because the error of a single key would show its value.
    @model_validator(mode="before")
    @classmethod
    def _shows_no_secret(cls, values: Any) -> Any:
        if isinstance(values, dict):
            name, urls = values.get("api_key_env"), values.get("urls")
            if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
                raise ValueError(
                    "api_key_env: the name of an environment variable in capital letters is expected, such as "
                    "SERVER_API_KEY, and never the key itself"
                )
            for index, url in enumerate(urls if isinstance(urls, list) else []):
                problem = _problem_of(url)
                if problem:
                    raise ValueError(f"urls.{index}: {problem}")
        return values

    @field_validator("extra_body")
    @classmethod
    def _leaves_ours_alone(cls, body: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(body.keys() & _OURS)
        if taken:
            raise ValueError(f"`{taken[0]}` is set by this package from the question; remove it")
        try:
            json.dumps(body, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("plain JSON values are expected, without infinity or NaN") from None
        return body

    @property
    def addresses(self) -> list[str]:
        """The urls without a slash at their end, each once."""
        return list(dict.fromkeys(url.rstrip("/") for url in self.urls))

    def identity(self, *, chooses: bool) -> dict[str, Any]:
        """Return what answers depend on besides the questions; where the server stands and who pays is no part of it.

        Args:
            chooses: whether it is asked to choose between options, where `logprobs` matters.
        """
        how = {"logprobs": self.logprobs, "top_logprobs": self.top_logprobs} if chooses else {}
        return {"server_model": self.model, "extra_body": self.extra_body, **how}

    def key(self, name: str, environment: Mapping[str, str] = os.environ) -> str | None:
        """Return the key for the engine of this name; None where it needs none.

        Raises:
            ConfigError: the variable is not set, or holds what cannot be sent. The value is not shown.
        """
        if self.api_key_env is None:
            return None
        value = environment.get(self.api_key_env, "").strip()
        where = f"engines.{name}.api_key_env: the environment variable `{self.api_key_env}`"
        if not value:
            raise ConfigError(f"{where} is not set or empty. Set it to the key of the server, and run again.")
        if not re.fullmatch(r"[!-~]+", value):
            raise ConfigError(f"{where} holds a space or a character outside of ASCII, which no key has. Set it again.")
        return value


def is_local(url: str) -> bool:
    """Tell whether an address is this machine's own."""
    return urlsplit(url).hostname in _LOCAL


def _problem_of(url: Any) -> str | None:
    """Return what is wrong with an address, without quoting a part of it that may be secret."""
    example = "an address such as http://127.0.0.1:8000/v1 is expected"
    if not isinstance(url, str):
        return f"{example} (found {type(url).__name__})"
    try:
        parts = urlsplit(url)
        port_is_good = parts.port != 0
    except ValueError:
        return f"host or port cannot be read; {example}"
    if "@" in parts.netloc:
        return "a user name or password stands before `@`; put the key into an environment variable (`api_key_env`)"
    if parts.query or parts.fragment:
        return f"it holds `?` or `#`; {example}"
    if parts.scheme not in ("http", "https"):
        return f"only http and https are spoken; {example}"
    if not parts.hostname or not port_is_good or not re.fullmatch(r"[!-~]+", url) or "\\" in url:
        return f"no host that can be asked stands in it; {example}"
    if parts.path.rstrip("/").endswith("/chat/completions"):
        return "leave `/chat/completions` off; the base address is expected, which mostly ends in /v1"
    return None
