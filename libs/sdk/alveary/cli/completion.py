"""alveary completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the shell's code that completes commands and options.

    \b
    bash: echo 'eval "$(alveary completion bash)"' >> ~/.bashrc
    zsh:  echo 'eval "$(alveary completion zsh)"' >> ~/.zshrc
    fish: alveary completion fish > ~/.config/fish/completions/alveary.fish
    """
    made = get_completion_class(shell)
    assert made is not None, shell
    click.echo(made(ctx.find_root().command, {}, "alveary", "_ALVEARY_COMPLETE").source())
