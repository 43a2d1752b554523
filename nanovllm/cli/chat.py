"""`nanovllm chat`: a conversation in the terminal, or through a pipe with one turn a line."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Generator
from typing import cast

from nanovllm.cli.complete import sampling_params
from nanovllm.cli.options import engine_options, sampling_options
from nanovllm.errors import RequestError
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer.tokenizer import Message

_HELP = "Ctrl-C stops an answer, /reset forgets the conversation, /exit or Ctrl-D ends."


def run(args: argparse.Namespace) -> int:
    given = sampling_options(args)
    SamplingParams(**given)  # a mistake in it should not wait for the model
    with LLM(args.model, **engine_options(args)) as llm:
        if args.chat_template is None and llm.get_tokenizer().chat_template is None:
            raise RequestError(
                f"{args.model} has no chat template: use `nanovllm complete`, or give one with --chat-template FILE"
            )
        chat = Chat(llm, sampling_params(llm, given, None), args.system_prompt, args.chat_template)
        if sys.stdin.isatty():
            _talk(chat)
        else:
            _answer_lines(chat)
    return 0


class Chat:
    """The history of one conversation and the engine that continues it.

    The history holds whole exchanges only: a question that got no answer is not in it.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system_prompt: str | None, template: str | None) -> None:
        self._llm = llm
        self._params = params
        self._template = template
        self._system: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self._exchanges: list[tuple[Message, Message]] = []

    def _messages(self, left_out: int) -> list[Message]:
        return [*self._system, *(message for exchange in self._exchanges[left_out:] for message in exchange)]

    def reset(self) -> None:
        self._exchanges.clear()

    def answer(self, text: str) -> Generator[str, None, None]:
        """Pieces of the answer as they come. Closing the iterator, or an exception in it, keeps
        what was said so far. Raises RequestError for what does not fit into max_model_len."""
        question: Message = {"role": "user", "content": text}
        prompt, forgotten = self._fitting_prompt(question)
        stream = self._llm.stream(prompt, self._params)
        if forgotten:
            del self._exchanges[:forgotten]
            _note(f"max_model_len is reached: the oldest of the conversation is forgotten, turns: {forgotten}")
        said: list[str] = []
        output: RequestOutput | None = None
        try:
            with contextlib.closing(stream):
                while True:
                    try:
                        said.append(next(stream))
                    except StopIteration as end:
                        output = end.value
                        break
                    yield said[-1]
        finally:
            if said or output is not None:
                self._exchanges.append((question, {"role": "assistant", "content": "".join(said)}))
        assert output is not None
        if output.outputs[0].finish_reason == "length":
            _note("the answer is cut: max_tokens or max_model_len is reached")

    def _fitting_prompt(self, question: Message) -> tuple[list[int], int]:
        """Token ids of the conversation, and how many of its oldest exchanges must be left out so
        that there is room for max_tokens, or for a quarter of max_model_len if that is less."""
        limit = self._llm.engine.config.max_model_len
        assert limit is not None
        room = min(self._params.max_tokens or limit, limit // 4)
        for left_out in range(len(self._exchanges) + 1):
            ids = self._llm.get_tokenizer().apply_chat_template(
                [*self._messages(left_out), question], add_generation_prompt=True, chat_template=self._template
            )
            prompt = cast("list[int]", ids)
            if len(prompt) + room <= limit:
                break
        return prompt, left_out


def _talk(chat: Chat) -> None:
    """Someone at a terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() editing and a history
    _note(_HELP)
    while True:
        try:
            line = input("> ").strip()
            if line and not _obey(line, chat):
                _print_answer(chat, line)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return
        except RequestError as error:
            _note(f"error: {error}")


def _answer_lines(chat: Chat) -> None:
    with contextlib.suppress(EOFError):
        for line in map(str.strip, sys.stdin):
            if line and not _obey(line, chat):
                _print_answer(chat, line)


def _print_answer(chat: Chat, line: str) -> None:
    with contextlib.closing(chat.answer(line)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
    print(flush=True)


def _obey(line: str, chat: Chat) -> bool:
    """Whether the line was a command, carried out. EOFError for /exit."""
    if not re.fullmatch(r"/[a-z]+", line):
        return False
    if line == "/exit":
        raise EOFError
    if line == "/reset":
        chat.reset()
    else:
        _note(_HELP)
    return True


def _note(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)
