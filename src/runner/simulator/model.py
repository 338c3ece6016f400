"""What the simulated provider's models say."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from runner.config import SimulatorConfig
from runner.errors import ConfigError, ParseError
from runner.response_format import ResponseFormat
from runner.simulator.body import Body
from runner.simulator.document import document_for
from runner.simulator.text import CHARS_PER_TOKEN, filler, tokens_in, uniform


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer of a model."""

    text: str  # or the arguments of the call
    tokens: int
    finish_reason: str
    tool: str | None = None  # the function to call
    call_id: str = ""

    def piece(self, step: int) -> str:
        return self.text[step * CHARS_PER_TOKEN : (step + 1) * CHARS_PER_TOKEN]


@dataclass(frozen=True, slots=True)
class Model:
    """All of the provider's models. The same request gets the same answer."""

    config: SimulatorConfig
    key: AnswerKey

    def answer(self, body: Body, prompt: str, index: int = 0) -> Choice:
        """The choice number ``index``, cut to ``max_tokens``.

        A known question is answered by the key; otherwise ``echo`` repeats the prompt and other models talk. A schema
        gets that answer if it is such a document, otherwise a document with it in it.
        """
        model, limit = body.model, body.max_tokens
        tool, schema = body.tool or (None, body.schema)
        drawn = uniform(self.config.seed, "text", body.identity, index)
        known = self._known(prompt, f"{body.identity}{index}")
        if schema is not None and not (known and _is_document(known, schema)):
            text = orjson.dumps(document_for(schema, text=known or filler(6, drawn), number=drawn)).decode()
        elif known is not None:
            text = known
        elif model.rpartition("/")[2] == "echo":
            text = f"echo: {prompt}"
        else:
            text = filler(self.config.output_tokens, drawn)
        cut = text if limit is None else text[: limit * CHARS_PER_TOKEN]
        # OpenAI says "stop" where the caller named the function, "tool_calls" where the model chose it.
        ending = "tool_calls" if tool and body.fields["tool_choice"] == "required" else "stop"
        return Choice(
            text=cut,
            tokens=tokens_in(cut),
            finish_reason="length" if cut != text else ending,
            tool=tool,
            call_id=f"call_{body.identity}{index}",
        )

    def vector(self, model: str, text: str, size: int | None = None) -> list[float]:
        """The text's embedding: of unit length, the same for the same text."""
        normal = random.Random(f"{self.config.seed}\0{model}\0{text}").gauss
        values = [normal(0.0, 1.0) for _ in range(size or self.config.embedding_size)]
        norm = math.sqrt(sum(value * value for value in values))
        return [value / norm for value in values]

    def _known(self, prompt: str, request: str) -> str | None:
        """What the key says of the question in the prompt, or another of its answers: that goes by the request."""
        question = self.key.find(prompt)
        if question is None:
            return None
        answer = self.key.answers[question]
        if uniform(self.config.seed, "accuracy", request) < self.config.accuracy:
            return answer
        others = [other for other in self.key.distinct if other != answer]
        return others[int(uniform(self.config.seed, "wrong", request) * len(others))] if others else None


def _is_document(text: str, schema: dict[str, Any]) -> bool:
    """Whether the text is an object or an array that satisfies the schema."""
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        ResponseFormat.of(schema).parse(text)
    except (ConfigError, ParseError):
        return False
    return True


QUICKSTART = Path(__file__).parent.parent / "data" / "quickstart.jsonl"


class AnswerKey:
    """Questions and their answers, found within a prompt without looking at every question.

    A question of at least ``2w - 1`` characters covers, wherever it stands in a prompt, one of the prompt's blocks of
    ``w`` characters that begin at a multiple of ``w``. So the blocks at the first ``w`` offsets of each question are
    indexed, and a prompt is searched in as many steps as it has blocks.
    """

    def __init__(self, answers: Mapping[str, str]) -> None:
        self.answers = answers
        self.distinct = sorted(set(answers.values()))
        self._places: dict[int, dict[str, set[tuple[int, int]]]] = {}  # width: block: (its offset, question's length)
        for question in answers:
            width = min(8, 1 << ((len(question) + 1) // 2).bit_length() - 1)
            blocks = self._places.setdefault(width, {})
            for offset in range(width):
                blocks.setdefault(question[offset : offset + width], set()).add((offset, len(question)))

    @classmethod
    def read(cls, path: str | None) -> AnswerKey:
        """The key in a JSONL file with ``question`` and ``answer``; None: the quickstart's, if it is there.

        Raises:
            ConfigError: It cannot be read; names the file and the line.
        """
        if path is None and not QUICKSTART.exists():
            return cls({})
        source, number = Path(path or QUICKSTART), 0
        answers: dict[str, str] = {}
        try:
            for number, line in enumerate(source.read_bytes().splitlines(), 1):  # noqa: B007
                row = orjson.loads(line.strip() or b'{"question": "", "answer": ""}')
                if not isinstance(row, dict):
                    raise ValueError(f"it holds {line[:20].decode(errors='replace')}")
                answers[str(row["question"]).strip()] = str(row["answer"])
        except OSError as error:
            raise ConfigError(f"simulator.answers={source}: {error.strerror}") from None
        except KeyError as error:
            raise ConfigError(f"simulator.answers: {source}:{number} has no {error.args[0]!r}") from None
        except ValueError as error:
            raise ConfigError(
                f"simulator.answers: {source}:{number} is no JSON object with 'question' and 'answer': {error}"
            ) from None
        answers.pop("", None)
        return cls(answers)

    def find(self, prompt: str) -> str | None:
        """The question in the prompt: of several the one that ends last (others are examples), the longest of these."""
        best = (0, 0, "")
        for width, blocks in self._places.items():
            for start in range(0, len(prompt) - width + 1, width):
                for offset, length in blocks.get(prompt[start : start + width], ()):
                    begin = start - offset
                    if begin >= 0 and (text := prompt[begin : begin + length]) in self.answers:
                        best = max(best, (begin + len(text), len(text), text))
        return best[2] or None
