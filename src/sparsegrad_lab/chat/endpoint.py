"""The OpenAI-compatible server that runs a judge. Key and address come from the environment and are never written.

Messages name the host of the server, and nothing else of its address.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

KEY, URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"
"""Environment variables of the `openai` client."""


class EndpointError(ConnectionError):
    """The server refused a request, or could not be reached. The judgements so far are in the file."""


class Endpoint:
    """Sends messages to a model of the server.

    Requests that fail with 408, 409, 429, 5xx, a time-out or a broken connection are sent again, with growing pauses
    or the pause that the server asks for; the `openai` client does that.

    Args:
        model: name of the model on the server.
        max_tokens: largest number of tokens of a judgement.
        timeout: seconds to wait for a judgement.
        retries: largest number of repetitions of a failed request.

    Raises:
        ValueError: the environment has no key.
        ModuleNotFoundError: the package `openai` is not installed.
    """

    def __init__(self, model: str, max_tokens: int = 2048, timeout: float = 300.0, retries: int = 6) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("a judge needs a package: pip install openai") from error
        if not os.environ.get(KEY):
            raise ValueError(
                f"a judge needs a key in ${KEY} (any text, for a server that checks none), and the address of "
                f"the server in ${URL} if it is not OpenAI's"
            )
        self.model, self.max_tokens = model, max_tokens
        self._client = openai.AsyncOpenAI(timeout=timeout, max_retries=retries)
        url = self._client.base_url
        self.address = url.host if url.port is None else f"{url.host}:{url.port}"  # the rest may hold a password

    async def ask(self, messages: list[dict[str, str]], temperature: float) -> str:
        """Return the model's answer.

        Raises:
            EndpointError: the server refused the request, or there was no answer after all repetitions.
        """
        with self._clear_errors():
            request: Any = {"messages": messages, "temperature": temperature, "max_tokens": self.max_tokens}
            found = await self._client.chat.completions.create(model=self.model, **request)
            return str(found.choices[0].message.content or "")

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
        except openai.APITimeoutError:
            raise EndpointError(
                f"{self.address}: no answer in {self._client.timeout:g} seconds, several times"
            ) from None
        except openai.APIConnectionError as error:
            raise EndpointError(
                f"{self.address}: no connection ({self._without_key(error.__cause__ or error)}); is the server running?"
            ) from None
        except openai.APIError as error:
            raise EndpointError(f"{self.address}: {self._without_key(error)}") from None
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            raise EndpointError(
                f"{self.address}: expected an answer in OpenAI's form, found another ({self._without_key(error)})"
            ) from None

    def _without_key(self, error: BaseException) -> str:
        return str(error).replace(os.environ.get(KEY) or "\0", "***")[:300] or type(error).__name__
