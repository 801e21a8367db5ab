"""Prompts of a judge: the package's own and FastChat's fill in the same fields."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from real_models import data_folder
from sparsegrad_lab.chat.prompts import fields_of, read_prompts


@pytest.mark.parametrize("source", ["own", "fastchat"])
def test_every_field_is_filled_in(source: str) -> None:
    path = None if source == "own" else data_folder("mt_bench") / "fastchat_judge_prompts.jsonl"
    prompts = read_prompts(path)
    assert len(prompts) == 8
    for name, prompt in prompts.items():
        values = {field: f"<{field} {{x}}>" for field in fields_of(name)}
        system, user = prompt.messages(values)
        assert (system["role"], user["role"]) == ("system", "user")
        read = {field for field, value in values.items() if value in user["content"]}
        assert read >= fields_of(name) - {"ref_answer_2"}
        assert "[[" in system["content"] + user["content"]  # how to write the rating


def test_own_prompts_ask_for_what_is_parsed() -> None:
    for name, prompt in read_prompts().items():
        text = prompt.system + prompt.template
        assert ("[[5]]" in text) == name.startswith("single")
        assert ("[[A]]" in text and "[[B]]" in text and "[[C]]" in text) == name.startswith("pair")


def test_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"name": name, "system_prompt": prompt.system, "prompt_template": prompt.template}
        for name, prompt in read_prompts().items()
    ]
    path.write_text("\n".join(map(json.dumps, rows[:-1])), encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected prompts named pair-math-v1-multi-turn, found none"):
        read_prompts(path)
    rows[0]["prompt_template"] = "{question} {answer.__class__} {secret}"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"single-v1: unknown field secret; expected some of answer, question"):
        read_prompts(path)
    path = tmp_path / "prompts.yaml"
    for content in ("", "3"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"prompts\.yaml: expected a list of prompts, found '(None|3)'"):
            read_prompts(path)
