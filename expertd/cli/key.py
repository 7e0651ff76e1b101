"""`expertd key`: a new API key, and the line by which a server knows it."""

import click


@click.command("key", epilog="Example: expertd key laptop")
@click.argument("name", default="")
def key_command(name: str) -> None:
    """Make an API key, for NAME.

    Prints the key, which is kept nowhere, and the line for the file that `expertd serve --api-keys FILE` reads.
    """
    from expertd.server.keys import PREFIX, digest_of, new_key

    key = new_key()
    click.echo(f"the key, shown only now: {key}")
    click.echo(f"the line for --api-keys: {f'{PREFIX}{digest_of(key)} {name}'.strip()}")
