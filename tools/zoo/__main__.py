"""Adapt one small model of every architecture that timm, transformers, torchvision and open_clip know.

python -m tools.zoo walk                      every model that RESULTS does not hold yet, each in a process of its own
python -m tools.zoo walk timm/coat hf/vit     some of them, afresh
python -m tools.zoo page                      writes docs/zoo.md from RESULTS
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

from .page import PAGE, write_page
from .results import append, latest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "local/zoo/results.jsonl"


def parse_args() -> Namespace:
    parser = ArgumentParser(prog="python -m tools.zoo", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    walk = commands.add_parser("walk", formatter_class=ArgumentDefaultsHelpFormatter)
    walk.add_argument("keys", nargs="*", help="models such as timm/coat; all that are missing if none is named")
    walk.add_argument("--time-limit", type=float, default=420, help="seconds for one model")
    walk.add_argument("--memory-limit", type=float, default=16, help="GiB of address space for one model")
    walk.add_argument("--results", type=Path, default=RESULTS, help="JSON lines, one for every model")
    walk.add_argument("--fallback-only", action="store_true", help="pass models over that have a family")
    walk.add_argument("--no-graphs", action="store_true", help="leave compile and export out")
    walk.add_argument("--rows", nargs="*", help="methods, as rows of tests/matrix.py name them; all by default")
    page = commands.add_parser("page", formatter_class=ArgumentDefaultsHelpFormatter)
    page.add_argument("--results", type=Path, default=RESULTS)
    one = commands.add_parser("one", help="what walk starts for one model; prints its result")
    one.add_argument("key")
    one.add_argument("--memory-limit", type=float, default=16)
    one.add_argument("--fallback-only", action="store_true")
    one.add_argument("--no-graphs", action="store_true")
    one.add_argument("--rows", nargs="*")
    return parser.parse_args()


def walk(args: Namespace) -> None:
    from .models import all_keys

    known = latest(args.results)
    keys = args.keys or [key for key in all_keys() if key not in known]
    for i, key in enumerate(keys, 1):
        result = _in_a_process(key, args)
        append(args.results, result)
        print(f"[{i}/{len(keys)}] {key}: {result['outcome']} in {result.get('seconds', 0):.0f} s", flush=True)


def _in_a_process(key: str, args: Namespace) -> dict:
    command = [sys.executable, "-m", "tools.zoo", "one", key, "--memory-limit", str(args.memory_limit)]
    command += ["--fallback-only"] * args.fallback_only + ["--no-graphs"] * args.no_graphs
    command += ["--rows", *args.rows] if args.rows else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=args.time_limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"key": key, "outcome": f"took more than {args.time_limit:.0f} s", "seconds": args.time_limit}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"key"')]
    if lines:
        return json.loads(lines[-1])
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"key": key, "outcome": f"the process ended with {done.returncode}: {last[:300]}"}


def one(args: Namespace) -> None:
    import resource

    limit = int(args.memory_limit * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from .life import live

    result = live(args.key, args.rows, fallback_only=args.fallback_only, graphs=not args.no_graphs)
    print(json.dumps(result, ensure_ascii=False), flush=True)


def main() -> None:
    args = parse_args()
    if args.command == "walk":
        walk(args)
    elif args.command == "one":
        one(args)
    else:
        write_page(latest(args.results).values())
        print(PAGE)


if __name__ == "__main__":
    main()
