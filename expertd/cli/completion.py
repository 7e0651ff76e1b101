"""`expertd completion`: what a shell needs to complete our commands and flags."""

import click


@click.command(
    "completion",
    epilog="Example: expertd completion bash >> ~/.bashrc",
)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete expertd's commands, flags and their values.

    \b
    bash  ~/.bashrc:  eval "$(expertd completion bash)"
    zsh   ~/.zshrc:   eval "$(expertd completion zsh)"
    fish  ~/.config/fish/completions/expertd.fish:  expertd completion fish | source
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    # The variable that click's own main looks for: _EXPERTD_COMPLETE.
    click.echo(found(context.find_root().command, {}, "expertd", "_EXPERTD_COMPLETE").source())
