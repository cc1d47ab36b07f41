"""The command line: everything the page does, through the same runner and recorder.

Results go to stdout, words about them to stderr. Exit status: 0 done, 1 failed, 2 bad usage.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analyzers.errors import BadInput, CandorError, Stopped
from analyzers.home import database_path
from app import doctor

if TYPE_CHECKING:
    from analyzers.registry import Method
    from analyzers.trace import RunStarted
    from app.estimate import Paces
    from sessions.store import Run as StoredRun
    from sessions.store import Store

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. No command starts the page."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or (given[0].startswith("--") and given[0] != "--help"):
        given.insert(0, "page")
    try:
        args = _parser().parse_args(given)
        return int(args.command(args))
    except (KeyboardInterrupt, Stopped):
        _say("Stopped.")
        return INTERRUPTED
    except BadInput as error:
        _say(str(error))
        return BAD_USAGE
    except CandorError as error:
        _say(str(error))
        return FAILED
    except BrokenPipeError:  # `candor ... | head`
        sys.stderr.close()
        return DONE


# Commands


def _page(args: argparse.Namespace) -> int:
    from app.page.main import serve

    serve(
        host=args.host,
        port=args.port,
        browser=not args.no_browser,
        model=_model_choice(args),
        password=os.environ.get("CANDOR_PASSWORD", ""),
        remote_code=args.allow_remote_code,
    )
    return DONE


def _run(args: argparse.Namespace) -> int:
    from analyzers import registry
    from analyzers.task import Task, chat
    from analyzers.trace import RunStarted
    from app.estimate import Paces
    from app.runner import Job, Runner
    from sessions.export import event_line

    method = registry.method(args.method)
    text = _prompt(args)
    raw = args.mode == "raw" if args.mode else method.card.starts_as == "raw"
    if raw and args.system:
        raise BadInput("--system belongs to a conversation: leave it out with --raw.")
    if raw and args.earlier:
        raise BadInput("--earlier belongs to a conversation: leave it out with --raw.")
    prompt = text if raw else chat(text, args.system, _turns(args.earlier))
    job = Job(
        method=method.name,
        task=Task(prompt, prefix=args.prefix, inputs=_inputs(args.input, method)),
        params=_pairs("--set", args.set),
        seed=args.seed,
        model=_model_choice(args),
    )
    with _store() as store:
        # A measuring would be broken off by the end; what the page has measured is used.
        runner = Runner(store, remote_code=args.allow_remote_code, measure=False)
        try:
            run = runner.submit(job)
            beside: dict[str, str] = {}
            for update in run.updates():
                for stamped in update.new:
                    if args.json:
                        print(event_line(stamped))
                    elif isinstance(stamped.event, RunStarted):
                        _foresee(stamped.event, method, Paces(store, but=run.id))
                    else:
                        _show(stamped.event, beside)
                if update.unsaved:
                    _say(update.unsaved)
                sys.stdout.flush()
        finally:
            runner.close()
        return _status_of(run.events[-1].event, run.id, beside, quiet=args.json)


def _evaluate(args: argparse.Namespace) -> int:
    from analyzers import workbench
    from analyzers.params import build
    from analyzers.task import Task
    from analyzers.trace import Metric
    from app.runner import Job, Runner

    known = Path(args.data).suffix == "" and not Path(args.data).exists()
    given = {
        "data" if known else "file": args.data,
        "signals": ", ".join(part.strip() for part in args.signals.split(",")),
        "limit": 0 if args.limit is None else args.limit,
        "columns": args.columns,
        "encoding": args.encoding,
        "max_new": args.max_new,
        "resume": args.resume,
    }
    if args.limit is not None and args.limit < 1:
        raise BadInput(f"A limit of {args.limit:,} leaves no question: give 1 or more.")
    params: Any = build(workbench.Params, given)
    asked = workbench.questions(params)  # refused before anything is loaded or recorded
    workbench.chosen_signals(params.signals)
    with _store() as store:
        runner = Runner(store, remote_code=args.allow_remote_code, measure=False)
        try:
            run = runner.submit(
                Job(
                    method=workbench.NAME,
                    task=Task(f"{asked.name}: {len(asked.questions):,} questions"),
                    params=given,
                    seed=0,
                    model=_model_choice(args),
                )
            )
            for update in run.updates():
                for stamped in update.new:
                    event = stamped.event
                    if isinstance(event, Metric) and event.name == "done":
                        left = stamped.t * (1 / event.value - 1) if event.value else 0
                        n = len(asked.questions)
                        _say(f"{event.step:,} of {n:,} questions, about {left:.0f} s left")
                if update.unsaved:
                    _say(update.unsaved)
        except (KeyboardInterrupt, Stopped):
            _say(f"Go on with: --resume {run.id}")
            raise
        finally:
            runner.close()
        events = [stamped.event for stamped in run.events]
    found = workbench.report(events) | {"run": run.id}
    if args.json:
        print(json.dumps(found, ensure_ascii=False, allow_nan=False))
    else:
        _trust_table(found)
    return _status_of(run.events[-1].event, run.id, {}, quiet=args.json)


def _trust_table(found: Mapping[str, Any]) -> None:
    """What each signal is worth, the most telling first; 95 % intervals in brackets."""
    if found["accuracy"] is None:
        return

    def shown(row: Mapping[str, Any], name: str) -> str:
        value, ends = row[name], row[f"{name}_interval"]
        if value is None:
            return ""
        return f"{value:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")

    lo, hi = found["accuracy_interval"]
    print(f"{found['n']:,} questions, {found['accuracy']:.1%} right [{lo:.1%}, {hi:.1%}]\n")
    metrics = ("auroc", "auprc", "aurc", "prr", "ece", "brier")
    rows = [
        {"signal": row["signal"], "n": row["n"]} | {name: shown(row, name) for name in metrics}
        for row in sorted(found["signals"], key=lambda row: -(row["auroc"] or 0))
    ]
    _table(rows, False, ("signal", *metrics, "n"))
    for why in dict.fromkeys(row["why"] for row in found["signals"] if row["why"]):
        _say(f"Undefined where it is empty: {why}.")


def _methods(args: argparse.Namespace) -> int:
    from analyzers import registry

    rows = [
        {
            "name": method.name,
            "title": method.card.title,
            "family": method.card.family,
            "source": method.card.source,
            "needs": list(method.card.needs),
            "emits": [kind.__name__ for kind in method.card.emits],
        }
        for method in registry.methods().values()
    ]
    _table(rows, args.json, ("name", "title", "family", "source"))
    return DONE


def _history(args: argparse.Namespace) -> int:
    with _store() as store:
        rows = [_row(run) for run in store.runs(search=args.search, limit=args.limit)]
    _table(rows, args.json, ("id", "created", "method", "model", "status", "tokens", "prompt"))
    return DONE


def _export(args: argparse.Namespace) -> int:
    from sessions.export import export_jsonl
    from sessions.numbers import export_csv

    with _store() as store:
        ids = [store.run(id).id for id in args.run]
        if args.format == "csv":
            what = f"{export_csv(store, ids, args.out):,} numbers"
        else:
            runs = export_jsonl(store, ids, args.out)
            what = f"{runs} run{'s' if runs != 1 else ''}"
    _say(f"{what} written to {args.out}.")
    return DONE


def _import(args: argparse.Namespace) -> int:
    from sessions.export import import_jsonl

    with _store() as store:
        for id in import_jsonl(store, args.file):
            print(id)
    return DONE


def _doctor(args: argparse.Namespace) -> int:
    text, status = doctor.main()
    print(text)
    return status


def _bench(args: argparse.Namespace) -> int:
    from app import bench

    if not args.name:
        for name, about in bench.names().items():
            print(f"{name:10} {about}")
        return DONE
    given = {name: getattr(args, name) for name in ("limit", "data") if getattr(args, name)}
    rows = bench.run(args.name, progress=_say, **given)
    if not args.json:  # a limit says in which direction it is one
        signs = {"less": "<=", "more": ">="}
        rows = [
            each | {"target": f"{signs[each['better']]} {each['target']:g}"}
            if each["target"] is not None
            else each
            for each in rows
        ]
    columns = ("name", "value", "spread", "unit", "baseline", "ratio", "target", "met", "n")
    _table(rows, args.json, columns)
    return DONE


# Arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch.py",
        description="Candor: how sure is a language model, and can it be trusted?",
    )
    commands = parser.add_subparsers(title="commands", required=True)

    def command(name: str, does: Callable[[Any], int], help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(command=does)
        return made

    page = command("page", _page, "open the page (what happens without a command)")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on (loopback)")
    page.add_argument("--port", type=int, default=doctor.PORT)
    page.add_argument("--no-browser", action="store_true", help="do not open a browser")
    _add_model(page)

    run = command("run", _run, "run a method and record it")
    run.add_argument("method", metavar="METHOD")
    text = run.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT")
    text.add_argument("--prompt-file", metavar="F", type=Path)
    mode = run.add_mutually_exclusive_group()
    mode.add_argument("--chat", dest="mode", action="store_const", const="chat")
    mode.add_argument("--raw", dest="mode", action="store_const", const="raw")
    run.add_argument("--system", default="", metavar="S", help="system prompt")
    run.add_argument(
        "--earlier", default="", metavar="JSON", help="earlier turns, role and content"
    )
    run.add_argument("--prefix", default="", metavar="P", help="beginning of the answer")
    run.add_argument("--set", action="append", default=[], metavar="name=value")
    run.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="name=text",
        help="what the method takes beside the prompt; name=@F reads a file, @@ is an @",
    )
    run.add_argument("--seed", type=int, metavar="N")
    run.add_argument("--json", action="store_true", help="one event a line on stdout")
    _add_model(run)

    evaluate = command("evaluate", _evaluate, "what each signal is worth on known questions")
    evaluate.add_argument(
        "--data", required=True, metavar="NAME|FILE",
        help="capitals, elements, arithmetic, misconceptions, or a CSV or JSON Lines file",
    )  # fmt: skip
    evaluate.add_argument(
        "--signals",
        default="sequence_logprob,mean_logprob,min_logprob,mean_entropy,p_true",
        metavar="a,b",
        help="what to measure",
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="only so many questions")
    evaluate.add_argument(
        "--columns", default="", metavar="question=A,answer=B", help="where the guess is wrong"
    )
    evaluate.add_argument(
        "--encoding", default="", metavar="E", help="of the file; UTF-8 if not said"
    )
    evaluate.add_argument("--max-new", type=int, default=16, metavar="N", help="longest answer")
    evaluate.add_argument(
        "--resume", default="", metavar="RUN", help="go on with a run that was broken off"
    )
    evaluate.add_argument("--json", action="store_true", help="one object on stdout")
    _add_model(evaluate)

    methods = command("methods", _methods, "list the methods")
    methods.add_argument("--json", action="store_true")

    history = command("history", _history, "list recorded runs, newest first")
    history.add_argument("--search", default="", metavar="TEXT")
    history.add_argument("--limit", type=int, default=50)
    history.add_argument("--json", action="store_true")

    export = command("export", _export, "write runs to a file")
    export.add_argument("run", nargs="+", metavar="RUN", help="id, or its beginning")
    export.add_argument(
        "--format",
        choices=["jsonl", "csv"],
        default="jsonl",
        help="jsonl: whole runs, to import; csv: their numbers, to compute with",
    )
    export.add_argument("--out", required=True, type=Path, metavar="F")

    imports = command("import", _import, "read runs from an exported file; prints their ids")
    imports.add_argument("file", type=Path, metavar="F")

    bench = command("bench", _bench, "measure; without a name, list what can be measured")
    bench.add_argument("name", nargs="?", metavar="NAME")
    bench.add_argument("--limit", type=int, metavar="N", help="only so many of its questions")
    bench.add_argument("--data", metavar="FOLDER", help="public data, for those that need it")
    bench.add_argument("--json", action="store_true")

    command("doctor", _doctor, "what is installed, cached and working, and what is wrong")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--model", metavar="M", help="built-in name, folder, .gguf file, or org/name on the hub"
    )
    model.add_argument(
        "--quantization",
        default="auto",
        metavar="Q",
        help="auto, none, int8 (CPU), or nf4, fp4, int8-bnb (bitsandbytes)",
    )
    model.add_argument(
        "--dtype", default="auto", metavar="D", help="auto, float32, bfloat16, float16"
    )
    model.add_argument(
        "--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:N, mps, split"
    )
    model.add_argument(
        "--compute", default="auto", metavar="D", help="dtype in which nf4 and fp4 multiply"
    )
    model.add_argument(
        "--no-double", action="store_true", help="nf4 and fp4: keep their scales unquantized"
    )
    model.add_argument(
        "--allow-remote-code",
        action="store_true",
        help="run code that comes with a model; only for a model whose code you have read",
    )


def _model_choice(args: argparse.Namespace) -> Any:
    from app.runner import DEFAULT, ModelChoice

    return ModelChoice(
        args.model or DEFAULT,
        quantization=args.quantization,
        dtype=args.dtype,
        device=args.device,
        double=not args.no_double,
        compute=args.compute,
    )


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return str(args.prompt)
    return _read(args.prompt_file)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"Cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not a UTF-8 text.") from None


def _turns(given: str) -> tuple[dict[str, str], ...]:
    if not given:
        return ()
    problem = BadInput('--earlier takes JSON: [{"role": "user", "content": "…"}, …].')
    try:
        turns = json.loads(given)
    except json.JSONDecodeError:
        raise problem from None
    roles = ("user", "assistant")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict)
        and turn.get("role") in roles
        and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise problem
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    pairs = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise BadInput(f"{option} takes name=value, not {item!r}.")
        pairs[name.strip()] = value
    return pairs


def _inputs(given: list[str], method: "Method") -> dict[str, str]:
    inputs = _pairs("--input", given)
    for name, value in inputs.items():
        if name not in method.card.takes:
            takes = ", ".join(method.card.takes) or "nothing beside the prompt"
            raise BadInput(f"There is no input {name!r}: {method.name} takes {takes}.")
        if value.startswith("@@"):
            inputs[name] = value[1:]
        elif value.startswith("@"):
            inputs[name] = _read(Path(value[1:]))
    return inputs


# Output


@contextmanager
def _store() -> "Iterator[Store]":
    from sessions.store import Store

    store = Store(database_path())
    try:
        yield store
    finally:
        store.close()


def _foresee(started: "RunStarted", method: "Method", paces: "Paces") -> None:
    """Say what a search will take: now, for its model is known exactly only when it is loaded."""
    from app.estimate import estimate

    model = dict(started.model) | {"cost": started.cost}
    if told := estimate(method, started.params, model, paces):
        _say(told)


def _show(event: Any, beside: dict[str, str]) -> None:
    """Print the text as it comes; what is said beside it waits in `beside` for its end. Of a metric
    that is told again and again the last value is said."""
    from analyzers.trace import MAIN, Metric, Note, Token

    if isinstance(event, Token) and event.lane == MAIN:
        print(event.text if event.bytes else "", end="")
    elif isinstance(event, Note):
        beside[event.text] = event.text
    elif isinstance(event, Metric):
        beside[event.name] = f"{event.name}: {event.value:.4g} {event.unit}".rstrip()


def _status_of(ended: Any, id: str, beside: Mapping[str, str], quiet: bool) -> int:
    if not quiet:
        print()
        for line in beside.values():
            _say(line)
        _say(
            f"{ended.status}: {ended.reason} · {ended.tokens} tokens in {ended.seconds:.1f} s"
            f" · run {id}"
        )
    return {"done": DONE, "stopped": INTERRUPTED}.get(ended.status, FAILED)


def _row(run: "StoredRun") -> dict[str, Any]:
    return {
        "id": run.id,
        "created": run.created,
        "method": run.method,
        "model": run.model,
        "status": run.status,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "mean_logprob": run.mean_logprob,
        "prompt": run.prompt_text,
        "output": run.output,
        "seed": run.seed,
        "parent": run.parent,
        "fork_pos": run.fork_pos,
    }


def _table(rows: list[dict[str, Any]], as_json: bool, columns: Sequence[str]) -> None:
    """JSON rows whole, or the columns for eyes, the last one clipped."""
    if as_json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False, allow_nan=False))
        return
    cells = [[_cell(row[name]) for name in columns] for row in rows]
    widths = [max([len(name), *(len(line[i]) for line in cells)]) for i, name in enumerate(columns)]
    for line in [list(columns), *cells]:
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        print("  ".join(padded).rstrip())


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    clean = " ".join(text.split())
    printable = "".join(char for char in clean if char.isprintable())
    return printable[:60] + "…" if len(printable) > 60 else printable


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
