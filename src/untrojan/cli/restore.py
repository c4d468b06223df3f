"""`untrojan restore`: the original weights back, bit for bit."""

from pathlib import Path

import click

from untrojan.cli.options import require_file_output
from untrojan.defenses.defense import CHANGES, REPAIRED
from untrojan.errors import ConfigError, RecordError
from untrojan.sources.files import read_state, save_state, state_sha256
from untrojan.sources.undo import restore as undo


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The safetensors file to write.")
@click.option("--force", is_flag=True, help="Replace the file.")
def restore(folder: Path, out: Path, force: bool) -> int:
    """Undo the repair in FOLDER, bit for bit, and write the original weights."""
    require_file_output(out)
    if out.exists() and not force:
        raise ConfigError(f"{out} exists; give another file, or --force to replace it")
    if out.resolve() in [(folder / name).resolve() for name in (REPAIRED, CHANGES)]:
        raise ConfigError(f"{out} is a part of the repair, which would be replaced; give another file")
    if missing := [name for name in (REPAIRED, CHANGES) if not (folder / name).is_file()]:
        raise RecordError(f"{folder} has no {' and no '.join(missing)}; expected a folder that `untrojan repair` wrote")
    original = undo(read_state(folder / REPAIRED)[0], folder / CHANGES)
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    save_state(out, original)
    click.echo(f"wrote {out}, the original weights with state {state_sha256(original)}")
    return 0
