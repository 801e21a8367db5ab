"""The OpenAI-compatible server that runs a judge. Key and address come from the environment and are never written.

Messages name the host of the server, and nothing else of its address.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

KEY, URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"
"""Environment variables of the `openai` client."""
_SECRET = 8
"""Keys of as many characters are kept out of messages. Shorter ones are no secrets, and parts of words."""


class EndpointError(ConnectionError):
    """The server refused a request, or could not be reached. The judgements so far are in the file."""


class Endpoint:
    """Sends messages to a model of the server.

    Requests that fail with 408, 409, 429, 5xx or a broken connection are sent again, with growing pauses or the pause
    that the server asks for; the `openai` client does that.

    Args:
        model: name of the model on the server.
        max_tokens: largest number of tokens of a judgement.
        timeout: seconds to wait for a judgement, repetitions included.
        retries: largest number of repetitions of a failed request.

    Raises:
        ValueError: the environment has no key, or one that cannot be sent, or an address that is none.
        ModuleNotFoundError: the package `openai` is not installed.
    """

    def __init__(self, model: str, max_tokens: int = 2048, timeout: float = 300.0, retries: int = 6) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("a judge needs a package: pip install openai") from error
        self._key = os.environ.get(KEY, "").strip()
        if not self._key:
            raise ValueError(
                f"a judge needs a key in ${KEY} (any text, for a server that checks none), and the address of "
                f"the server in ${URL} if it is not OpenAI's"
            )
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"${KEY}: expected printable ASCII characters, found others; copy the key again")
        self.model, self.max_tokens, self.timeout = model, max_tokens, timeout
        # No time-outs of its own: `ask` limits the whole.
        self._client = openai.AsyncOpenAI(api_key=self._key, base_url=_address(), timeout=None, max_retries=retries)
        url = self._client.base_url
        self.address = url.host if url.port is None else f"{url.host}:{url.port}"  # the rest may hold a password

    async def ask(self, messages: list[dict[str, str]], temperature: float) -> str:
        """Return the model's answer.

        Raises:
            EndpointError: the server refused the request, or there was no answer after all repetitions.
        """
        request: Any = {"messages": messages, "temperature": temperature, "max_tokens": self.max_tokens}
        with self._clear_errors():
            found = await asyncio.wait_for(
                self._client.chat.completions.create(model=self.model, **request), self.timeout
            )
        try:
            return str(found.choices[0].message.content or "")
        except (IndexError, AttributeError, TypeError) as error:
            raise self._other_form(error) from None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        import openai

        try:
            yield
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise EndpointError(f"{self.address}: the key in ${KEY} was refused ({error.status_code})") from None
        except openai.NotFoundError as error:
            raise EndpointError(
                f"{self.address}: there is no model {self.model!r}, or the address in ${URL} is wrong "
                f"({self._without_key(error)})"
            ) from None
        except asyncio.TimeoutError:
            raise EndpointError(f"{self.address}: no answer in {self.timeout:g} seconds") from None
        except openai.APIConnectionError as error:
            raise EndpointError(
                f"{self.address}: no connection ({self._without_key(error.__cause__ or error)}); is the server running?"
            ) from None
        except openai.APIError as error:
            raise EndpointError(f"{self.address}: {self._without_key(error)}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._other_form(error) from None

    def _other_form(self, error: Exception) -> EndpointError:
        return EndpointError(
            f"{self.address}: expected an answer in OpenAI's form, found another ({self._without_key(error)})"
        )

    def _without_key(self, error: BaseException) -> str:
        text = str(error)
        if len(self._key) >= _SECRET:
            text = text.replace(self._key, "***")
        return text[:300] or type(error).__name__


def _address() -> str | None:
    """Return the server's address in the environment; None: OpenAI's.

    Raises:
        ValueError: it is no address. The message does not repeat it, since it may hold a password.
    """
    address = os.environ.get(URL)
    if address is None:
        return None
    address = address.strip()
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and address.isprintable()
    except ValueError:  # the port is none
        valid = False
    if not valid:
        raise ValueError(
            f"${URL}: expected an address such as http://localhost:8000/v1, found another text; correct or unset it"
        )
    return address
