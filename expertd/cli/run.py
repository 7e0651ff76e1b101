"""`expertd run`: one prompt, one answer."""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expertd.cli.options import (
    draft_model_option,
    find_draft,
    find_model,
    group_options,
    kv_bits_option,
    make_group,
    warn_of_link,
)
from expertd.config import GroupConfig
from expertd.errors import ClusterError, ConfigError, ExpertdError
from expertd.sampling import MAX_LOGPROBS, Sampling

if TYPE_CHECKING:
    from expertd.cluster.supervisor import Cluster
    from expertd.engine.messages import Candidate, Done, Logprobs, Submit, Token

# What a shell reports for a program that a broken pipe ended.
BROKEN_PIPE = 141
# The leader says how far it is once a second.
READ_S = 0.5

SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


@click.command("run", epilog="Example: expertd run demo 'Once upon a time' --ranks 2 --split experts")
@click.argument("model")
@click.argument("prompt")
@group_options
@click.option("--max-tokens", type=click.IntRange(min=1), default=200, show_default=True, help="At most.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0: greedy.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Nucleus."
)
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0: all.")
@click.option(
    "--min-p",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Cut below this share of the likeliest.",
)
@click.option(
    "--repetition-penalty", type=click.FloatRange(0.1, 10), default=1.0, show_default=True, help="1: none."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Makes sampling repeatable.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given again.")
@click.option("--chat", is_flag=True, help="Put the prompt through the model's chat template.")
@draft_model_option
@kv_bits_option
@click.option("--prefill-chunk", type=int, default=512, show_default=True, help="Prompt tokens per step.")
@click.option("--logits", type=click.Path(dir_okay=False, path_type=Path), help="Write the logits there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option(
    "--logprobs",
    type=click.IntRange(0, MAX_LOGPROBS),
    metavar="N",
    help="With --json: of each token, and of the N likeliest.",
)
def run_command(model: str, prompt: str, as_json: bool, **options: Any) -> None:
    """Let MODEL continue PROMPT and print its text as it comes.

    MODEL is `demo`, a folder, a hub id or a URL of a folder. PROMPT is raw text (- reads standard input). The
    figures of the run go to standard error.
    """
    from expertd.cluster.memory import with_memory

    if options["logprobs"] is not None and not as_json:
        raise ConfigError("--logprobs: needs --json. Add it, or leave --logprobs out.")
    sampling = Sampling(**{k: options.pop(k) for k in SAMPLING_OPTIONS})
    submit_options = {k: options.pop(k) for k in ("max_tokens", "stop", "logprobs")}
    chat, logits = options.pop("chat"), options.pop("logits")
    submit = _make_submit(_read_prompt(prompt), chat, logits, sampling=sampling, **submit_options)
    # Flags first: they are wrong in no time, while a hub id may take an hour to download.
    make_group(Path(), **options)
    info = find_model(model)
    options["draft_model"] = find_draft(options["draft_model"])
    group = make_group(info.folder, **options)
    group = with_memory(info, group)
    warn_of_link(group)
    logging.basicConfig(format="expertd: %(message)s", level=logging.WARNING)
    sys.exit(_answer(group, submit, as_json))


def _read_prompt(prompt: str) -> str:
    text = sys.stdin.read() if prompt == "-" else prompt
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ConfigError("PROMPT: not valid UTF-8. Convert it, for example with iconv.") from e
    return text


def _make_submit(
    text: str, chat: bool, logits: Path | None, *, stop: tuple[str, ...], **options: Any
) -> "Submit":
    from expertd.engine.messages import Submit

    if logits and not logits.absolute().parent.is_dir():
        raise ConfigError(f"--logits {logits}: no folder {logits.absolute().parent}. Create it first.")
    source: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    logits_file = str(logits.absolute()) if logits else None
    return Submit("run", stop=list(stop), logits_file=logits_file, **source, **options)


def _answer(group: GroupConfig, submit: "Submit", as_json: bool) -> int:
    from expertd.cli.signals import run_until_signal

    try:
        run_until_signal(_generate(group, submit, as_json))
    except BrokenPipeError:
        return BROKEN_PIPE
    return 0


async def _generate(group: GroupConfig, submit: "Submit", as_json: bool) -> None:
    from contextlib import AsyncExitStack

    from expertd.cli.output import Progress, progress, write_out
    from expertd.cluster.supervisor import Cluster
    from expertd.engine.messages import Done, Token

    tokens: list[Token] = []
    done: Done | None = None
    async with AsyncExitStack() as stack:
        with progress(what := f"loading {group.num_ranks} rank(s)") as no_longer, Progress() as bar:

            def loaded(num_bytes: int, total_bytes: int) -> None:
                no_longer()  # the seconds: a bar says more
                bar(what, num_bytes, total_bytes)

            cluster = await stack.enter_async_context(Cluster.open(group, loading=loaded))
        events = await stack.enter_async_context(aclosing(cluster.generate(submit)))
        tell_no_more = stack.enter_context(_reading(cluster))
        try:
            async for event in events:
                if isinstance(event, Token):
                    tell_no_more()
                    tokens.append(event)
                    await write_out("" if as_json else event.text)
                elif isinstance(event, Done):
                    done = event
        except ExpertdError:
            # The reason must not be glued to the text so far.
            await write_out("\n" if tokens and not as_json else "")
            raise
        if done is None:
            raise ClusterError("the answer has no end. This is a bug of expertd.")
        text = "".join(token.text for token in tokens)
        kernels = cluster.ready.kernels
        await write_out(
            _as_json(tokens, text, done, kernels) if as_json else "" if text.endswith("\n") else "\n"
        )
    print(_figures(done), file=sys.stderr)


@contextlib.contextmanager
def _reading(cluster: "Cluster") -> "Iterator[Callable[[], None]]":
    """Until the function that this gives is called, show a terminal how much of the prompt is read."""
    import asyncio

    from expertd.cli.output import Progress

    with Progress("tokens") as bar:

        async def tell() -> None:
            while True:
                await asyncio.sleep(READ_S)
                if (latest := cluster.record.latest) and latest.reading:
                    bar("reading the prompt", latest.reading[0].num_read, latest.reading[0].num_tokens)

        task = asyncio.create_task(tell())

        def stop() -> None:
            task.cancel()
            bar.close()

        try:
            yield stop
        finally:
            stop()


def _as_json(tokens: "list[Token]", text: str, done: "Done", kernels: str) -> str:
    values = {
        "token_ids": [token_id for token in tokens for token_id in token.token_ids],
        "text": text,
        "prompt_tokens": done.prompt_tokens,
        "prefill_tokens_per_s": done.prefill_tokens_per_s,
        "decode_tokens_per_s": done.decode_tokens_per_s,
        "split": done.split,
        "ranks": done.ranks,
        "kernels": kernels,
        "finish_reason": done.finish_reason,
    }
    if found := [_logprobs(logprobs) for token in tokens for logprobs in token.logprobs]:
        values["logprobs"] = found
    return json.dumps(values) + "\n"


def _logprobs(found: "Logprobs") -> dict[str, Any]:
    """As in chat answers, and the ids."""
    return {**_candidate(found.chosen), "top_logprobs": [_candidate(c) for c in found.top]}


def _candidate(candidate: "Candidate") -> dict[str, Any]:
    from expertd.server.wire import shape_of

    return {"token_id": candidate.token_id, **shape_of(candidate)}


def _figures(done: "Done") -> str:
    return (
        f"prompt: {done.prompt_tokens} tokens at {done.prefill_tokens_per_s:.1f}/s; "
        f"answer: {done.completion_tokens} tokens at {done.decode_tokens_per_s:.1f}/s; "
        f"split {done.split} on {done.ranks} rank(s); ended by {done.finish_reason}"
    )
