"""A conversation in the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..tasks.conversations import Message
from ..tasks.generation import RowSampling
from .model import ChatModel

COMMANDS = {
    "/reset": "start a new conversation",
    "/system TEXT": "set the system message, and start a new conversation; without TEXT: remove it",
    "/compare": "answer with and without what was trained, side by side; again: stop comparing",
    "/help": "show these commands",
    "/quit": "end (or Ctrl-D)",
}


@dataclass
class Session:
    """The state of a conversation.

    Args:
        model: answers.
        console: where answers appear.
        max_new_tokens: largest number of tokens of an answer.
        temperature: 0: greedy.
        seed: of the first answer; each answer has another one.
    """

    model: ChatModel
    console: Console
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    system: str | None = None
    base: ChatModel | None = None
    "set while answers are compared"
    messages: list[Message] = field(default_factory=list)

    def take(self, line: str) -> bool:
        """Answer a line of the user, or do what its command says. Returns False at the end of the session."""
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return False
        if word == "/help":
            self.show_commands()
        elif word == "/reset":
            self._reset("new conversation")
        elif word == "/system":
            self.system = rest.strip() or None
            self._reset("new conversation, with this system message" if self.system else "new conversation")
        elif word == "/compare":
            self._toggle_comparison()
        elif word.startswith("/"):
            self.console.print(f"no command {word}; /help lists them", style="dim")
        elif word:
            self._answer(line.strip())
        return True

    def show_commands(self) -> None:
        """Print the commands."""
        table = Table.grid(padding=(0, 2))
        for command, meaning in COMMANDS.items():
            table.add_row(command, meaning)
        self.console.print(table, style="dim")

    def _reset(self, said: str) -> None:
        self.messages = []
        self.console.print(said, style="dim")

    def _toggle_comparison(self) -> None:
        if self.base is not None:
            self.base = None
            self.console.print("no comparison", style="dim")
            return
        self.base = self.model.base()
        if self.base is None:
            self.console.print(f"{self.model.name} is a pretrained model: there is nothing to compare", style="dim")
        else:
            self.console.print(f"comparing {self.model.name} with {self.base.name}", style="dim")

    def _answer(self, text: str) -> None:
        """Stream the answer. Ctrl-C ends it early; the conversation then goes on without this exchange."""
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            answer = self._stream([*system, *asked]) if self.base is None else self._compare([*system, *asked])
        except KeyboardInterrupt:
            self.console.print("\nstopped; this exchange is forgotten", style="dim")
        except ValueError as error:
            self.console.print(f"{error}; /reset starts a new conversation", style="dim")
        else:
            self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _sampling(self) -> RowSampling:
        return RowSampling([self.temperature], [self.seed + len(self.messages)])

    def _stream(self, conversation: list[Message]) -> str:
        def show(words: str) -> None:
            self.console.print(words, end="")

        answer = self.model.stream(conversation, self.max_new_tokens, show, self._sampling())
        self.console.print()
        return answer

    def _compare(self, conversation: list[Message]) -> str:
        """Stream both answers into a table; the conversation goes on with the trained model's."""
        assert self.base is not None
        models = (self.base, self.model)
        texts = ["", ""]

        def table() -> Table:
            found = Table(*(model.name for model in models), expand=True)
            for column in found.columns:
                column.ratio = 1
            found.add_row(*texts)
            return found

        with Live(console=self.console, auto_refresh=False, vertical_overflow="visible") as live:
            for column, model in enumerate(models):

                def show(words: str, column: int = column) -> None:
                    texts[column] += words
                    live.update(table(), refresh=self.console.is_terminal)

                texts[column] = model.stream(conversation, self.max_new_tokens, show, self._sampling())
            live.update(table(), refresh=True)
        if not self.console.is_terminal:
            self.console.print()  # there, `Live` ends without a line break
        return texts[1]
