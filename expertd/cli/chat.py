"""`expertd chat`: a conversation in the terminal with a model that is served."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expertd.cli.client import Client, client_options
from expertd.cli.options import cache_folder
from expertd.errors import ConfigError, ExpertdError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

# Only who waits longer than this is told for what.
SOON_S = 0.7
LOOK_S = 0.5
# Codes that would move the cursor or change the terminal; a model may say anything.
CONTROL = {c: None for c in (*range(32), 127, *range(128, 160)) if chr(c) not in "\n\t"}


@click.command("chat", epilog="Example: echo 'Why is the sky blue?' | expertd chat --max-tokens 80")
@client_options
@click.option("--system", default="", metavar="TEXT", help="How the model should behave.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.7, show_default=True, help="0: greedy.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Of each answer [default: the context].")
def chat_command(server: str, api_key: str, system: str, temperature: float, max_tokens: int | None) -> None:
    """Talk to a model that `expertd serve` serves.

    Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D ends. /help lists the commands. Without a
    terminal, standard input is one message, and its answer goes to standard output.
    """
    chat = Chat(Client(server, api_key), system=system, temperature=temperature, max_tokens=max_tokens)
    chat.model = chat.client.model()
    if sys.stdin.isatty() and sys.stdout.isatty():
        _converse(chat)
    else:
        chat.ask(sys.stdin.read())


@dataclass
class Chat:
    """A conversation, and the way to go on with it."""

    client: Client
    system: str = ""
    temperature: float = 0.7
    max_tokens: int | None = None
    model: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    plain: bool = False  # the model has no chat template

    def ask(self, text: str) -> None:
        """Send a message and print its answer as it comes; Ctrl-C ends the answer, and what there is of it counts.

        Raises ExpertdError; the message is then not part of the conversation.
        """
        if not text.strip():
            raise ConfigError("the message is empty. Write something.")
        self.turns.append({"role": "user", "content": text})
        answer, began, usage = "", 0.0, None
        try:
            with _patience(self.client) as tell_no_more, contextlib.closing(self._events()) as events:
                for event in events:
                    usage = event.get("usage") or usage
                    if piece := _piece(event):
                        tell_no_more()
                        began = began or time.monotonic()
                        answer += piece
                        click.echo(piece.translate(CONTROL), nl=False)
                        sys.stdout.flush()
        except KeyboardInterrupt:
            pass  # it ends the answer; what came of it stays
        except ExpertdError:
            self.turns.pop()
            click.echo("\n" if answer else "", nl=False)
            raise
        click.echo("" if answer.endswith("\n") else "\n", nl=False)
        self.turns.append({"role": "assistant", "content": answer})
        _tell_speed(self.client, usage, time.monotonic() - began if began else 0.0)

    def _events(self) -> Generator[dict[str, Any], None, None]:
        options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": self.temperature}
        body: dict[str, Any] = {"model": self.model, **options}
        if self.max_tokens:
            body["max_tokens"] = self.max_tokens
        if not self.plain:
            system = [{"role": "system", "content": self.system}] if self.system else []
            try:
                yield from self.client.events(
                    "/v1/chat/completions", {**body, "messages": [*system, *self.turns]}
                )
                return
            except ConfigError as e:
                if "chat template" not in str(e):
                    raise
                self.plain = True
        prompt = self.system + "".join(turn["content"] for turn in self.turns)
        yield from self.client.events("/v1/completions", {"max_tokens": 200, **body, "prompt": prompt})


def _piece(event: dict[str, Any]) -> str:
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or choices[0].get("text") or ""


@contextlib.contextmanager
def _patience(client: Client) -> Iterator[Callable[[], None]]:
    """Until the function that this gives is called, tell a terminal how much of the prompt is read."""
    over, lock = threading.Event(), threading.Lock()

    def tell() -> None:
        pause_s = SOON_S
        while not over.wait(pause_s):
            with contextlib.suppress(ExpertdError):
                text = waiting_for(client.status())
                with lock:
                    if text and not over.is_set():
                        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            pause_s = LOOK_S

    def stop() -> None:
        with lock:
            if not over.is_set() and sys.stderr.isatty():
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            over.set()

    if sys.stderr.isatty():
        threading.Thread(target=tell, daemon=True).start()
    try:
        yield stop
    finally:
        stop()


def waiting_for(status: dict[str, Any]) -> str:
    """What a request without an answer waits for, from /status.json: others, or its own prompt."""
    engine = status["engine"] or {}
    if engine.get("reading"):
        read, total = engine["reading"][0]["num_read"], engine["reading"][0]["num_tokens"]
        filled = 24 * read // max(1, total)
        return f"reading the prompt [{'=' * filled}{' ' * (24 - filled)}] {read:,} of {total:,} tokens"
    return f"{engine['waiting']} requests wait" if engine.get("waiting") else ""


def _tell_speed(client: Client, usage: dict[str, int] | None, seconds: float) -> None:
    """The figures of an answer, to a terminal's standard error."""
    if not (usage and sys.stderr.isatty()):
        return
    tokens, split = usage["completion_tokens"], ""
    with contextlib.suppress(ExpertdError):
        split = ((client.status()["engine"] or {}).get("splits") or {}).get("decode") or ""
    speed = f", {(tokens - 1) / seconds:.3g} per second" if tokens > 1 and seconds > 0 else ""
    text = f"{usage['prompt_tokens']} read, {tokens} tokens{speed}{', ' + split if split else ''}"
    click.echo(click.style(text, dim=True), err=True)


# The terminal.


def _converse(chat: Chat) -> None:
    session = _session(cache_folder())
    click.echo(
        click.style(f"{chat.model} at {chat.client.url}. /help lists the commands, Ctrl-D ends.", dim=True)
    )
    while True:
        try:
            text = session.prompt("> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        try:
            if text.startswith("/"):
                if command(chat, text):
                    return
            elif text:
                chat.ask(text)
        except ExpertdError as e:
            click.echo(f"expertd: {e}", err=True)


def _session(folder: Path) -> "PromptSession[str]":
    """An input line with a history on disk, commands that complete, and Alt-Enter for a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / "chat-history"
        path.touch(mode=0o600)
        history: FileHistory | InMemoryHistory = FileHistory(str(path))
    except OSError:
        history = InMemoryHistory()
    words = WordCompleter([f"/{name}" for name in COMMANDS], sentence=True)
    return PromptSession(history=history, key_bindings=keys, completer=words, complete_while_typing=False)


def command(chat: Chat, text: str) -> bool:
    """Carry out a line that begins with /; whether that ends the conversation. Raises ConfigError."""
    name, _, rest = text[1:].partition(" ")
    if name not in COMMANDS:
        raise ConfigError(f"/{name}: no such command. /help lists them.")
    return bool(COMMANDS[name][0](chat, rest.strip()))


def _help(chat: Chat, rest: str) -> None:
    for name, (_, text) in COMMANDS.items():
        click.echo(f"  /{name.ljust(12)} {text}")


def _clear(chat: Chat, rest: str) -> None:
    chat.turns.clear()


def _system(chat: Chat, rest: str) -> None:
    chat.system = rest


def _temperature(chat: Chat, rest: str) -> None:
    try:
        value = float(rest)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise ConfigError(f"/temperature {rest}: wanted a number of 0 to 2, such as /temperature 0.7.")
    chat.temperature = value


def _tokens(chat: Chat, rest: str) -> None:
    if not rest.isdecimal() or not int(rest):
        raise ConfigError(f"/tokens {rest}: wanted a number of at least 1, such as /tokens 400.")
    chat.max_tokens = int(rest)


def _retry(chat: Chat, rest: str) -> None:
    if len(chat.turns) < 2:
        raise ConfigError("/retry: there is no answer yet.")
    chat.turns.pop()
    chat.ask(chat.turns.pop()["content"])


def _save(chat: Chat, rest: str) -> None:
    if not rest:
        raise ConfigError("/save: wanted a file, such as /save talk.md.")
    text = "\n\n".join(f"**{turn['role']}**\n\n{turn['content'].strip()}" for turn in chat.turns)
    try:
        Path(rest).expanduser().write_text(text + "\n", encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"/save {rest}: {e.strerror or e}. Choose another file.") from e


def _status(chat: Chat, rest: str) -> None:
    from expertd.cli.status import screen

    click.echo(screen(chat.client.status(), chat.client.url))


def _exit(chat: Chat, rest: str) -> bool:
    return True


COMMANDS: dict[str, tuple[Callable[[Chat, str], bool | None], str]] = {
    "help": (_help, "these lines"),
    "clear": (_clear, "forget the conversation"),
    "system": (_system, "TEXT: how the model should behave"),
    "temperature": (_temperature, "NUMBER: 0 is greedy"),
    "tokens": (_tokens, "NUMBER: most of an answer"),
    "retry": (_retry, "answer the last message again"),
    "save": (_save, "FILE: write the conversation, as Markdown"),
    "status": (_status, "the server on one screen"),
    "exit": (_exit, "end; so does Ctrl-D"),
}
