"""Task `oasst1`: OpenAssistant conversations (Köpf et al., 2023), from `.jsonl` files or the Hugging Face hub.

The data are trees of messages. Each tree gives one conversation: the prompt, the answer that annotators ranked first,
the first follow-up that has an answer, and so on. Taking all paths would repeat the early messages of each tree.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .conversations import Message, turns
from .glue import DATA_VARIABLE
from .read import read_objects
from .task import LANGUAGE, LOSSES, Task

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

HUB_NAME = "OpenAssistant/oasst1"
COLUMN = "conversation"
_HELD_OUT = 0.1  # share of the trees that is evaluated if there are no validation files
_NEEDED = ("message_id", "text", "role")

Tree = list[dict[str, Any]]
"""The messages of a tree in the order of the file, each with its parent's id."""


def load_oasst1(folder: str | Path | None = None, language: str | None = None, val_size: float | None = None) -> Task:
    """Load conversations, in the column "conversation"; the assistant's messages are learnt.

    Files with "validation" in their names are evaluation rows, the others training rows. A tree in both is not trained
    on. If only one of both exists, a tenth of the trees is held out, the same in each run.

    Args:
        folder: see `find_folder`; None: the folder in the environment variable SPARSEGRAD_DATA, else the hub.
        language: skip messages in other languages, and their answers.
        val_size: share of all trees that is evaluated; None: by the names of the files.

    Raises:
        FileNotFoundError: there are no such files, or the hub cannot be reached.
        ValueError: a file is not JSON lines, a message lacks a field, or no tree has an answer.
    """
    if folder is None:
        root = os.environ.get(DATA_VARIABLE)
        folder = root if root and any(any(found.glob("*.jsonl")) for found in _candidates(root)) else None
    if folder is None:
        source, trees = f"hub: {HUB_NAME}", _from_hub()
    else:
        files = find_folder(folder)
        source, trees = str(files), _from_folder(files)
    validation, train = trees["validation"], trees["train"]
    both = len(validation.keys() & train.keys())
    if both:
        logger.warning("oasst1: %d trees of the training files are validation trees too, and are not trained on", both)
    train = {name: tree for name, tree in train.items() if name not in validation}
    if val_size is not None:
        train, validation = _held_out({**train, **validation}, val_size)
    elif not train or not validation:
        train, validation = _held_out(train or validation, _HELD_OUT)
    splits = {}
    for split, found in (("train", train), ("validation", validation)):
        conversations = [turns(texts) for tree in found.values() if (texts := best_path(tree, language))]
        if not conversations:
            other = f" in language {language!r}" if language else ""
            raise ValueError(
                f"{source}: expected conversations with an answer{other} for the {split} split, found none in "
                f"{len(found)} trees"
            )
        splits[split] = _dataset(conversations)
        _log_counts(split, found.values(), len(conversations), language)
    return Task("oasst1", (COLUMN,), None, LOSSES, splits, source, LANGUAGE)


def best_path(tree: Tree, language: str | None = None) -> list[str]:
    """Return the texts of `best_messages`."""
    return [message["text"] for message in best_messages(tree, language)]


def best_messages(tree: Tree, language: str | None = None) -> list[dict[str, Any]]:
    """Return a conversation from the root of a tree to an answer, user and assistant in turn; or no message.

    Deleted messages are skipped with all replies to them, and so are messages whose parent is missing. The answer with
    the lowest rank comes first; of answers with the same rank, the first in the file. Answers without a rank, or with
    NaN, come last. The result of a review (`review_result`) is not read.
    """
    children: dict[str | None, Tree] = defaultdict(list)
    for message in tree:
        if _is_usable(message, language):
            children[message.get("parent_id")].append(message)
    for siblings in children.values():
        siblings.sort(key=_rank)
    found: list[dict[str, Any]] = []
    parent: str | None = None
    while True:
        exchanges = (
            (prompt, answer)
            for prompt in children.pop(parent, ())
            for answer in children.get(prompt["message_id"], ())
            if (prompt["role"], answer["role"]) == ("prompter", "assistant")
        )
        prompt, answer = next(exchanges, (None, None))
        if prompt is None or answer is None:
            return found
        found += [prompt, answer]
        parent = answer["message_id"]


def count_messages(tree: Tree, language: str | None = None) -> Counter[str]:
    """Count the messages of a tree by what becomes of them: kept, or the reason why not."""
    kept = {message["message_id"] for message in best_messages(tree, language)}
    children: dict[str | None, list[str]] = defaultdict(list)
    for message in tree:
        if _is_usable(message, language):
            children[message.get("parent_id")].append(message["message_id"])
    reached: set[str] = set()
    waiting = list(children[None])
    while waiting:
        name = waiting.pop()
        if name not in reached:  # a message may be its own ancestor
            reached.add(name)
            waiting += children[name]

    def fate(message: Mapping[str, Any]) -> str:
        if message.get("deleted"):
            return "deleted"
        if not _is_usable(message, language):
            return "in another language"
        if message["message_id"] in kept:
            return "kept"
        return "beside the best conversation" if message["message_id"] in reached else "without a usable parent"

    return Counter(map(fate, tree))


def _is_usable(message: Mapping[str, Any], language: str | None) -> bool:
    return not message.get("deleted") and language in (None, message.get("lang"))


def _log_counts(split: str, trees: Collection[Tree], conversations: int, language: str | None) -> None:
    counts: Counter[str] = sum((count_messages(tree, language) for tree in trees), Counter())
    kept = counts.pop("kept", 0)
    total = kept + sum(counts.values())
    left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    logger.warning(
        "oasst1, %s: kept %d of %d messages, in conversations from %d of %d trees; left out: %s", split, kept, total,
        conversations, len(trees), left_out or "none",
    )  # fmt: skip


def _rank(message: Mapping[str, Any]) -> float:
    rank = message.get("rank")
    return float("inf") if rank is None or rank != rank else rank


def find_folder(root: str | Path) -> Path:
    """Return the folder with the `.jsonl` files: `root/oasst1` or `root`. The files hold messages or nested trees.

    Raises:
        FileNotFoundError: there are no such files.
    """
    for folder in _candidates(root):
        if any(folder.glob("*.jsonl")):
            return folder
    raise FileNotFoundError(f"{root}: expected .jsonl files of OpenAssistant conversations, in {root}/oasst1 or {root}")


def _candidates(root: str | Path) -> tuple[Path, Path]:
    return Path(root) / "oasst1", Path(root)


def _from_folder(folder: Path) -> dict[str, dict[str, Tree]]:
    trees: dict[str, dict[str, Tree]] = {"train": defaultdict(list), "validation": defaultdict(list)}
    for path in sorted(folder.glob("*.jsonl")):
        split = trees["validation" if "validation" in path.stem else "train"]
        seen = {message["message_id"] for tree in split.values() for message in tree}
        for line, item in read_objects(path):
            nested = isinstance(item.get("prompt"), dict)
            for message in _flat(item["prompt"], None) if nested else [item]:
                _check_message(message, _NEEDED if nested else (*_NEEDED, "message_tree_id"), f"{path}, line {line}")
                if message["message_id"] not in seen:  # a message of an earlier file, or a copy
                    seen.add(message["message_id"])
                    tree = item["prompt"]["message_id"] if nested else item["message_tree_id"]  # the root's id
                    split[tree].append(message)
    return trees


def _check_message(message: dict[str, Any], texts: tuple[str, ...], where: str) -> None:
    """Raise ValueError unless the fields `texts` are texts and the others that are read have their type or are null."""
    missing = [name for name in texts if not isinstance(message.get(name), str)]
    if missing:
        raise ValueError(f"{where}: expected a message with {', '.join(texts)} as text, found no {', '.join(missing)}")
    for name, kinds, words in (("parent_id", (str,), "a text"), ("rank", (int, float), "a number")):
        if not isinstance(message.get(name), (*kinds, type(None))):
            raise ValueError(f"{where}: expected {words} as {name}, found {message[name]!r}")


def _flat(message: Any, parent: str | None) -> Iterator[dict[str, Any]]:
    """Yield a nested message and all replies below it, each with its parent's id."""
    message = message if isinstance(message, dict) else {}
    yield {**message, "parent_id": parent, "replies": None}
    replies = message.get("replies")
    for reply in replies if isinstance(replies, list) else ():
        yield from _flat(reply, message.get("message_id"))


def _from_hub() -> dict[str, dict[str, Tree]]:
    from datasets import load_dataset

    try:
        found = load_dataset(HUB_NAME)
    except Exception as error:  # the network raises many types
        raise FileNotFoundError(
            f"oasst1 could not be loaded from the hub ({type(error).__name__}: {error}); name a folder with .jsonl "
            f"files in data.folder, or one with oasst1/*.jsonl in ${DATA_VARIABLE}"
        ) from error
    return {split: from_messages(found[split]) for split in ("train", "validation")}


def from_messages(messages: Iterable[dict[str, Any]]) -> dict[str, Tree]:
    """Return trees by their ids, from messages in the hub's format."""
    trees: dict[str, Tree] = defaultdict(list)
    for message in messages:
        trees[message["message_tree_id"]].append(message)
    return trees


def _held_out(trees: dict[str, Tree], share: float) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """Return training trees and a share of held-out trees.

    A hash of the tree's id decides, so the order of the files does not matter.
    """
    names = sorted(trees, key=lambda name: hashlib.sha256(name.encode()).digest())
    held = set(names[: max(1, int(len(names) * share))])
    return (
        {name: tree for name, tree in trees.items() if name not in held},
        {name: tree for name, tree in trees.items() if name in held},
    )


def _dataset(conversations: list[list[Message]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({COLUMN: conversations})
