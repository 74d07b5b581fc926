"""`freeexport push`: publish a bundle or an exit on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from freeexport.commands.verb_options import SectionedCommand


@click.command(cls=SectionedCommand)
@click.argument("source", type=click.Path(path_type=Path), metavar="BUNDLE|EXIT")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option(
    "--revision", metavar="BRANCH", help="Branch to push to.  [default: the default branch]"
)
@click.option(
    "--license",
    metavar="ID",
    help="Licence, such as apache-2.0.  [default: the exit's, or the base model's on the hub]",
)
@click.option(
    "--base-model",
    metavar="OWNER/NAME",
    help="Name of the base model on the hub.  [default: as recorded by convert]",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    metavar="DIRECTORY",
    help="Results for the model card: the --output of evaluate.",
)
def command(source: Path, repository: str, **options: Any) -> None:
    """Publish BUNDLE, or the file of an EXIT, on the Hugging Face hub, with a model card.

    The repository is created if there is none. Of a bundle, only the files that its manifest lists
    are uploaded, after a check of their SHA-256. Log in with `hf auth login`, or set HF_TOKEN.
    Bundles on the hub are used by their names, as in `freeexport generate owner/name`, and exits as
    in `freeexport convert MODEL OUT --exit owner/name`.

    \b
    Example:
      freeexport push bundle owner/name --private
      freeexport push bundle owner/name --license apache-2.0 --results results
    """
    from freeexport.publish import PushOptions, push

    click.echo(push(source, repository, PushOptions(**options)))
