"""The verb `so8t layers`: rank the layers in which a rotation would learn most.

Heavy imports happen inside the verb, so that help and a mistyped path answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pipeline.cli.saying import page

BAR = 24  # characters of the longest bar


def layers(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Hugging Face checkpoint", show_default=False)],
    rows: Annotated[Path, typer.Option(metavar="FILE", help="JSONL or Parquet file with chats", show_default=False)],
    targets: Annotated[
        list[str] | None, typer.Option("--target", metavar="NAME", help="a linear layer; repeatable; default: all")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="rows for the gradient")] = 4,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="seed of the choice of rows")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="draw the ranking by layer and target")] = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="number of places to show")] = 20,
) -> None:
    """Rank where a rotation would learn most.

    Puts a rotation at the identity in front of every linear layer and compares their gradients in the first training
    step. `train.layers: auto:N` takes the N layers with the largest gradients.
    """
    from transformers.utils import logging as chatter

    from pipeline.train.layers import ranked_places, write_plot
    from pipeline.train.placement import best_layers

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    places = ranked_places(directory, rows, targets=targets or (), batch_size=batch_size, seed=seed)
    if plot is not None:
        write_plot(places, plot)
    table = Table("layer", "target", "gradient, nats per rad", "", "parameters", box=None, pad_edge=False)
    largest = max((place.score for place in places), default=0.0) or 1.0
    for place in places[:top]:
        bar = "#" * round(BAR * place.score / largest)
        table.add_row(str(place.layer), place.target, f"{place.score:.3g}", bar, f"{place.parameters:,}")
    order = best_layers(places, len({place.layer for place in places}), ranked=True)
    with page() as console:
        console.print(table)
        if len(places) > top:
            console.print(f"{len(places) - top} more places; --top shows them.")
        console.print(f"Layers, most gradient first: {', '.join(map(str, order))}", soft_wrap=True)
