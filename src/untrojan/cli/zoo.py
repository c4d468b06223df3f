"""`untrojan lab zoo`: victims of many attacks, and clean models beside them."""

import sys
from pathlib import Path

import click

from untrojan.cli import FAILED
from untrojan.cli.options import quiet_option, require_output, working
from untrojan.errors import visible
from untrojan.lab.zoo import MANIFEST, Zoo, fill


@click.command()
@click.argument("zoo_file", metavar="ZOO.TOML", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the zoo; may hold a part of it.")
@quiet_option
def zoo(zoo_file: Path, out: Path, quiet: bool) -> int:
    """Train all victims and clean models that a TOML file asks for.

    Each gets a folder OUT/DATA/NET/ATTACK/SEED as from `untrojan lab train`, or "clean" for the attack. What is there
    is kept, an interrupted training goes on, and what cannot be trained is told and passed over; the exit code is then
    2. An attack that did not take is a result like any other. OUT/manifest.json holds hashes, recipes, ACC and ASR.
    """
    require_output(out, force=True)
    asked = Zoo.load(zoo_file)
    results, failed = sys.stdout, 0
    with working(quiet):
        for outcome in fill(asked, out):
            click.echo(visible(str(outcome)), file=results)
            failed += outcome.entry is None
    click.echo(f"wrote {out / MANIFEST}" + (f"; {failed} failed" if failed else ""))
    return FAILED if failed else 0
