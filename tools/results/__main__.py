"""Make the tables of docs/results.md: carry out the study behind a table, and write what it found into the page.

python -m tools.results --list                             which tables there are, what each needs, how long it takes
python -m tools.results methods --data ../shared/data      carries out what is left of the study, and writes the table
python -m tools.results methods --data ../shared/data --only-page    writes the table from the runs that are there

A table stands between `<!-- table NAME: begin -->` and `<!-- end -->`. The text around it is written by hand, and
stays.
"""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

from .adapters import Adapters
from .page import ROOT, Page
from .study import Table
from .tables import TABLES, describe


def parse_args(words: list[str] | None = None) -> Namespace:
    description = __doc__.splitlines()[0]
    parser = ArgumentParser("python -m tools.results", None, description, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("table", nargs="?", choices=list(TABLES), help="the table to make")
    parser.add_argument("--list", action="store_true", help="say which tables there are, and stop")
    parser.add_argument("--data", type=Path, help="folder of the data sets, as their paths in --list go on from it")
    parser.add_argument("--runs", type=Path, default=ROOT / "local/results", help="folder for the runs of all tables")
    parser.add_argument("--only-page", action="store_true", help="train nothing; write the page from what is there")
    args = parser.parse_args(words)
    if not args.list and (args.table is None or args.data is None):
        parser.error("name a table and --data, or give --list")
    return args


def make(table: Table | Adapters, data: Path, runs: Path, page: Page, only_page: bool = False) -> None:
    """Do what is left of a table's runs, and write it to the page. FileNotFoundError for a missing folder of images."""
    missing = [] if only_page else [folder for folder in table.needs if not (data / folder).is_dir()]
    if missing:
        raise FileNotFoundError(f"the table {table.name} needs {data / missing[0]}; see --list")
    table.make(data, runs, page, only_page)


def main(words: list[str] | None = None) -> None:
    args = parse_args(words)
    if args.list:
        print("\n\n".join(describe(table) for table in TABLES.values()))
        return
    page = Page()
    make(TABLES[args.table], args.data, args.runs, page, args.only_page)
    print(page.file)


if __name__ == "__main__":
    main()
