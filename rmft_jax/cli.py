"""The command line: every command calls one library function."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from rmft_jax.errors import PeersMissing, Preempted, UserError
from rmft_jax.files import disk_fault
from rmft_jax.paths import as_path

app = typer.Typer(
    help="Train GPTs on text full of personal data without memorizing it, and measure what they memorized.\n\n"
    "Start: `rmft doctor` says what works here; `rmft demo` does the whole job on a bundled corpus; `rmft init DATA` "
    "writes a config for your own text.\n\n"
    "The main job: prepare -> train (once with masking.policy=none, once without) -> audit -> compare -> report.\n\n"
    "Any setting can follow a command as key.path=value. Results go to stdout (--json for programs), progress to stderr. "
    "Tab completes: rmft --install-completion.",
    add_completion=True,
    pretty_exceptions_enable=False,
)
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ConfigPath = Annotated[Path, typer.Argument(help="A YAML config, such as configs/enron_cpu.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change: key.path=value ...")]
convert = typer.Typer(help="Bring models of Hugging Face in as a start of training, and take runs out for `transformers`.")
app.add_typer(convert, name="convert")
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="Your text: JSON lines, CSV, Parquet, text, an mbox, a folder of mail.")],
    to: Annotated[Path | None, typer.Option(help="The config to write [default: the data's name, .yaml].")] = None,
    out: Annotated[str, typer.Option(help="Directory of the experiment [default: runs/ and the data's name].")] = "",
    minutes: Annotated[float, typer.Option(min=0.1, help="How long one training may take on this machine.")] = 15.0,
    as_json: Json = False,
) -> None:
    """Look at a sample of your text and at this machine, and write a commented config for both."""
    from rmft_jax.devices import use_cores
    from rmft_jax.suggest import config_name, describe, suggest_config, write_config

    path = to or Path(config_name(str(data)))
    use_cores()
    found = suggest_config(str(data), minutes=minutes, out=out, name=str(path))
    write_config(found, path)
    print(json.dumps({key: value for key, value in found.items() if key != "yaml"}) if as_json else describe(found))
    print(f"wrote {path}, which says what to do next", file=sys.stderr)


@app.command()
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(help="Processes [default: as many as cores].", min=0)] = 0,
    runner: Annotated[str, typer.Option(help="local, or beam: an Apache Beam pipeline.")] = "local",
    beam_options: Annotated[str, typer.Option(help="Of the pipeline, such as '--runner=FlinkRunner ...'.")] = "",
    as_json: Json = False,
) -> None:
    """Turn text into a tagged data set: PII found and ranked, text tokenised."""
    import shlex

    from rmft_jax.config import load_config
    from rmft_jax.data.prepare import prepare

    settings = load_config(config, overrides or [])
    manifest = prepare(settings, workers=workers, runner=runner, beam_options=shlex.split(beam_options))
    if as_json:
        print(json.dumps(manifest))
        return
    train = manifest["train"]
    print(
        f"{settings.data_dir}: {train['documents']:,} documents, {train['tokens']:,} tokens, "
        f"{train['pii_occurrences']:,} PII occurrences of {manifest['pii_identities']:,} identities "
        f"({manifest['pii_repeating_pct']:.1f}% of the occurrences repeat an earlier one); "
        f"{manifest['heldout']['documents']:,} held-out documents; {manifest['skipped_documents']} skipped"
        + "".join(f"; {count} {name}" for name, count in manifest.get("faults", {}).items())
    )
    if vocabulary := manifest.get("vocabulary"):  # not in data that an earlier version prepared
        print(f"{vocabulary['pieces_with_pii']} of {vocabulary['pieces']:,} pieces of the vocabulary hold a PII value")


@app.command()
def dedup(config: ConfigPath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Write the prepared training text without its duplicates, and a report of the clusters."""
    from rmft_jax.config import load_config
    from rmft_jax.data.dedup_report import dedup
    from rmft_jax.data.prepare import load_prepared

    settings = load_config(config, overrides or [])
    report = dedup(settings, load_prepared(settings))
    if as_json:
        print(json.dumps(report))
        return
    print(
        f"{settings.out}/dedup: {report['kept_documents']:,} of {report['documents']:,} documents and "
        f"{report['kept_tokens']:,} of {report['tokens']:,} tokens are left; {report['near_duplicates']:,} near-duplicates "
        f"of {len(report['clusters']):,} documents, {report['repeated_tokens']:,} tokens in repeated substrings"
    )


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(min=1, help="How many devices.")] = 1,
    hbm: Annotated[str, typer.Option(help="Memory of each device, such as 80GB, 80GiB or 16e9 [default: no limit].")] = "",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the step too, for as many fake CPU devices.")] = False,
    chip: Annotated[str, typer.Option(help="v5e, v5p, v6e or h100: the least time of a step, and whether it fits.")] = "",
    topology: Annotated[str, typer.Option(help="Of a slice, such as 16x16: compile by libtpu, without a TPU.")] = "",
    scaling: Annotated[str, typer.Option(help="weak or strong: a table of twice as many chips again and again.")] = "",
    as_json: Json = False,
) -> None:
    """Say what a run takes of each device, and whether it fits, before there is any; exit code 2 where it does not."""
    from rmft_jax.config import load_config

    settings = load_config(config, overrides or [])
    from rmft_jax.devices import fake_devices
    from rmft_jax.training.memory import parse_bytes
    from rmft_jax.training.plan import describe, describe_scaling, plan, scaling_table

    limit = parse_bytes(hbm) if hbm else None
    fake_devices(devices if compile else 1)
    if scaling not in ("", "weak", "strong") or (scaling and not chip):
        raise UserError(f"--scaling is {scaling!r}: write weak or strong, and a --chip")
    if scaling:
        rows = scaling_table(settings, chip, most=devices, weak=scaling == "weak")
        print(json.dumps(rows) if as_json else describe_scaling(rows))
        return
    result = plan(settings, devices=devices, limit=limit, compile=compile, chip=chip, topology=topology)
    print(json.dumps(result) if as_json else describe(result))
    if result["error"]:
        raise UserError(result["error"])


@app.command()
def train(config: ConfigPath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train one model on prepared data; prints the run's directory."""
    from rmft_jax.config import load_config

    settings = load_config(config, overrides or [])
    from rmft_jax.devices import is_main, use_cores
    from rmft_jax.processes import join_processes
    from rmft_jax.training.loop import train

    use_cores(settings)
    join_processes()
    directory = train(settings)
    if is_main():
        print(json.dumps({"run": str(directory)}) if as_json else directory)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    step: Annotated[int, typer.Option(min=0, help="Which step [default: the last that was left out].")] = 0,
    as_json: Json = False,
) -> None:
    """Take a step that RUN left out again: which rows of its batch had which loss and gradient."""
    from rmft_jax.devices import use_cores
    from rmft_jax.training.setup import load_run_config

    use_cores(load_run_config(run))
    from rmft_jax.training.replay import replay

    found = replay(run, step)
    print(json.dumps(found)) if as_json else _print_replay(found)
    print(f"wrote {run / 'replay' / str(found['step'])}.json", file=sys.stderr)


@app.command()
def audit(
    runs: Annotated[list[str], typer.Argument(help="Run directories, then settings to change: audit.prompts=128 ...")],
    reveal: Annotated[bool, typer.Option(help="Write leaked addresses themselves, not only keyed hashes.")] = False,
    as_json: Json = False,
) -> None:
    """Attack every checkpoint of RUN...: what was memorized comes out as TER, SER, TEGR."""
    from rmft_jax.devices import use_cores
    from rmft_jax.memorization.extraction import audit

    paths, overrides = _split(runs)
    use_cores()
    results = audit(paths, overrides, reveal=reveal)
    if as_json:
        print(json.dumps(results))
        return
    for path, result in zip(paths, results, strict=True):
        last = result["checkpoints"][-1]["prompts"]["all"]
        print(
            f"{path / 'audit.json'}: at the last checkpoint {last['true_leaked']} of {result['identities']:,} identities "
            f"of the training text leaked (TER {last['ter']:.2f}%, SER {last['ser']:.2f}%, TEGR {last['tegr']:.1f}%)"
        )


@app.command()
def track(
    runs: Annotated[list[str], typer.Argument(help="Run directories, or imported models with their settings: data=DIR ...")],
    as_json: Json = False,
) -> None:
    """Count which training tokens every saved checkpoint of RUN... has memorized: track.json and a table."""
    from rmft_jax.devices import use_cores
    from rmft_jax.memorization.tracker import track

    paths, overrides = _split(runs)
    use_cores()
    results = track(paths, overrides)
    if as_json:
        print(json.dumps(results))
        return
    for run, result in zip(paths, results, strict=True):
        _print_track(run, result)


@app.command("audit-vlm")
def audit_vlm(
    embeddings: Annotated[Path, typer.Argument(help="An .npz file of embeddings and objects: docs/deja_vu.md.")],
    out: Annotated[Path | None, typer.Option(help="Where to write [default: NAME.deja_vu.json beside it].")] = None,
    neighbours: Annotated[int, typer.Option(help="Public images that a caption is compared with.")] = 10,
    clusters: Annotated[int, typer.Option(help="For millions of public images: search approximately; 0 = exactly.")] = 0,
    probes: Annotated[int, typer.Option(help="Cells of the approximate search that each caption visits.")] = 16,
    as_json: Json = False,
) -> None:
    """Test a vision-language model of your own for deja vu memorization, by its embeddings."""
    from rmft_jax.devices import use_cores
    from rmft_jax.memorization.deja_vu import audit_vlm

    use_cores()
    result = audit_vlm(embeddings, out, k=neighbours, clusters=clusters, probes=probes)
    if as_json:
        print(json.dumps(result))
        return
    for name, test in result["tests"].items():
        ends = {gap: "[{:.3f}, {:.3f}]".format(*test["intervals"][gap]) for gap in ("ppg", "prg", "aucg")}
        gaps = ", ".join(f"{gap.upper()} {test['population'][gap]:.3f} {said}" for gap, said in ends.items())
        print(f"{name.replace('_', ' ')}: {gaps} ({result['records']:,} records, {result['public']:,} public images)")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Audited run directories, one of them without a defence.")],
    out: Annotated[Path | None, typer.Option(help="Where results.json goes [default: above the runs].")] = None,
    as_json: Json = False,
) -> None:
    """Compare the baseline with each method: results.json and a table."""
    from rmft_jax.memorization.compare import compare

    paths, overrides = _split(runs)
    where = out or (paths[0].parent.parent if paths[0].parent.name == "runs" else paths[0].parent)
    results = compare(paths, where, overrides, command=_command())
    print(json.dumps(results)) if as_json else _print_table(results)
    print(f"wrote {where / 'results.json'}", file=sys.stderr)


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="Directories with results.json; each gets its report.")],
    model_card: Annotated[bool, typer.Option("--model-card", help="model_card.md too: a section for a model card.")] = False,
    parquet: Annotated[bool, typer.Option("--parquet", help="Tables in Parquet too.")] = False,
    charts: Annotated[Path | None, typer.Option(help="A folder for the charts, an SVG file each.")] = None,
    as_json: Json = False,
) -> None:
    """Write report.html beside results.json: one file, no network."""
    from rmft_jax.files import read_json
    from rmft_jax.report.html import write_charts, write_report
    from rmft_jax.report.model_card import write_model_card
    from rmft_jax.report.tables import write_tables

    found = [read_json(place / "results.json", "results", "run `rmft compare` first") for place in directories]
    for place, results in zip(directories, found, strict=True):
        if not isinstance(results, dict) or results.get("schema") != 1:
            raise UserError(f"{place / 'results.json'} is not a results file of schema 1: run `rmft compare` again")
    written = []
    for place, results in zip(directories, found, strict=True):
        written.append(write_report(results, place / "report.html"))
        written += [write_model_card(results, place / "model_card.md")] if model_card else []
        written += write_tables(results, place) if parquet else []
        written += write_charts(results, charts / place.name if len(found) > 1 else charts) if charts else []
    print(json.dumps([str(path) for path in written]) if as_json else "\n".join(map(str, written)))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine and installation can do, what is missing, and how to get it."""
    from rmft_jax.devices import use_cores
    from rmft_jax.doctor import describe, diagnose

    use_cores()
    found = diagnose()
    print(json.dumps(found) if as_json else describe(found))
    if broken := [check for check in found["checks"] if check["status"] == "broken"]:
        raise UserError(f"{broken[0]['name']} is broken ({broken[0]['detail']}): {broken[0]['mend']}")


@app.command()
def demo(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="Another config [default: the bundled corpus].")] = None,
    out: Annotated[str, typer.Option(help="Output directory.")] = "runs/demo",
    as_json: Json = False,
) -> None:
    """Do the main job: prepare, train baseline, dedup and RMFT, audit, compare, report."""
    from rmft_jax.config import load_config

    settings = load_config(config, [f"out={out}", *(overrides or [])])
    from rmft_jax.demo import demo
    from rmft_jax.devices import use_cores

    use_cores(settings)
    results, path = demo(settings)
    if as_json:
        print(json.dumps(results))
        return
    _print_table(results)
    print(f"report: {path}")


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="Which study: rmft, scaling, early-learning, m-score, deja-vu, retroprompt.")],
    config: ConfigPath,
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option(help="End with exit code 3 if a claim does not hold.")] = False,
    as_json: Json = False,
) -> None:
    """Repeat a published study under several seeds: what holds, what does not."""
    from rmft_jax.config import load_config
    from rmft_jax.devices import use_cores
    from rmft_jax.studies import run_study

    settings = load_config(config, overrides or [])
    use_cores(settings)
    results = run_study(name, settings, command=_command())
    if as_json:
        print(json.dumps(results))
    else:
        _print_table(results)
        _print_claims(results)
    print(f"wrote {Path(settings.out) / 'results.json'}", file=sys.stderr)
    if strict and not all(claim["holds"] for claim in results["claims"]):
        raise typer.Exit(3)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="masking, tracker, train, generate, scaling, ..., see README.")],
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="A config [default: the demo's].")] = None,
    peer: Annotated[str, typer.Option(help="The rival to measure beside it [default: the benchmark's own].")] = "",
    model: Annotated[str, typer.Option(help="A preset: the name of a file in configs/models, or a path.")] = "",
    as_json: Json = False,
) -> None:
    """Measure this machine, ours and the peer in turn in one run."""
    from rmft_jax.bench import run_bench
    from rmft_jax.config import load_config
    from rmft_jax.devices import use_cores
    from rmft_jax.includes import find_model

    preset = [f"include={find_model(model)}"] if model else []
    settings = load_config(config, [*preset, *(overrides or [])])
    use_cores(settings)
    result = run_bench(name, settings, peer)
    if as_json:
        print(json.dumps(result))
        return
    print(f"{result['name']} on {result['device']}: {result['value']:.2f} {result['unit']}")
    if result["peer_value"] is not None:
        print(f"  against {result['peer']}: {result['peer_value']:.2f} {result['unit']}, ratio {result['ratio']:.3f}")
    if "overhead_pct" in result:
        print(f"  overhead {result['overhead_pct']:.2f}% (median of {len(result['runs'])} pairs)")


@convert.command("import")
def convert_import(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder (config.json, safetensors) or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="A new folder, for training.init_from.")],
    as_json: Json = False,
) -> None:
    """Make a folder that training starts from: weights, tokenizer, and the config that goes with them."""
    from rmft_jax.convert import convert_import

    found = convert_import(source, out)
    if as_json:
        print(json.dumps(found))
        return
    ends = f", texts between the ids {found['bos_id']} and {found['eos_id']}" if found["tokenizer"] else ""
    print(
        f"{out}: {found['family']}, {found['parameters']:,} parameters, vocabulary of {found['vocab_size']:,}, "
        f"tokenizer {found['tokenizer'] or 'none: set tokenizer.path yourself'}{ends}\n"
        f"start from it: write `include: {(out / 'config.yaml').absolute()}` in your config, or use it as one: "
        f"rmft prepare {out / 'config.yaml'} source.format=jsonl source.path=mail.jsonl out=runs/mine"
    )


@convert.command("export")
def convert_export(
    run: Annotated[Path, typer.Argument(help="A run's directory, or RUN/checkpoints/STEP.")],
    out: Annotated[Path, typer.Argument(help="A new folder, for AutoModelForCausalLM and AutoTokenizer.")],
    as_json: Json = False,
) -> None:
    """Write a run as a folder of Hugging Face `transformers`."""
    from rmft_jax.convert import convert_export

    done = convert_export(run, out)
    if as_json:
        print(json.dumps(done))
        return
    print(f"{out}: step {done['step']}, {done['parameters']:,} parameters, vocabulary of {done['vocab_size']:,}")


def _split(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Divide arguments into run directories and key=value overrides."""
    overrides = [item for item in arguments if "=" in item and not Path(item).exists()]
    paths = [as_path(item) for item in arguments if item not in overrides]
    if not paths:
        raise UserError("no run was named: give at least one run directory")
    return paths, overrides


def _command() -> str:
    return " ".join(["rmft", *sys.argv[1:]])


def _print_table(results: dict) -> None:
    from rich.console import Console

    from rmft_jax.report.html import text_table

    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(text_table(results))


def _print_track(run: Path, result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    names = [name for name, counts in result["checkpoints"][-1]["slices"].items() if counts["targets"]]
    table = Table(title=f"{run}: memorized, % of the training tokens", title_justify="left")
    for column in ("step", *names, "runs", "mean", "longest", f"blocks of {result['examples']:,}"):
        table.add_column(column, justify="right")
    for entry in result["checkpoints"]:
        runs = entry["runs"]
        table.add_row(
            f"{entry['step']:,}",
            *(f"{100 * entry['slices'][name]['m']:.2f}" for name in names),
            f"{runs['count']:,}",
            "" if runs["mean"] is None else f"{runs['mean']:.2f}",
            f"{runs['longest']:,}",
            f"{entry['examples_memorized']:,}",
        )
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)


def _print_replay(found: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    number = lambda value: "not finite" if value is None else f"{value:.4g}"  # noqa: E731
    verdict = "left out again" if found["left_out"] else "not left out this time"
    table = Table(
        title=f"step {found['step']}, from the checkpoint of step {found['from_step']}: {verdict}; "
        f"loss {number(found['loss'])}, gradient norm {number(found['gradient_norm'])}; parameters before it are "
        f"{'finite' if found['parameters_finite'] else 'not finite'}",
        title_justify="left",
    )
    mixed = ["data"] if "data" in found["rows"][0] else []
    for column in (*mixed, "block", "epoch", "documents", "tokens", "of them PII", "loss", "gradient norm"):
        table.add_column(column, justify="right")
    for row in found["rows"]:
        documents = ", ".join(map(str, row["documents"][:4])) + (", ..." if len(row["documents"]) > 4 else "")
        counts = (str(row[name]) for name in (*mixed, "block", "epoch"))
        rest = (str(row["tokens"]), str(row["pii_tokens"]), number(row["loss"]), number(row["gradient_norm"]))
        table.add_row(*counts, documents, *rest)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)


def _print_claims(results: dict) -> None:
    from rich.console import Console

    from rmft_jax.report.html import claims_table

    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(claims_table(results))


def _use_large_pages() -> None:
    """Start `rmft` again with memory in large pages, where Linux gives those on demand alone: 13% off a train step on CPU.

    glibc asks for them if it finds so in its environment when a process starts. A call from another program changes nothing.
    """
    setting, tunables = "glibc.malloc.hugetlb", os.environ.get("GLIBC_TUNABLES", "")
    if setting in tunables or sys.orig_argv[1:] != sys.argv or not _PAGES.exists() or "[madvise]" not in _PAGES.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{setting}=1".lstrip(":")
    os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    """Run the command line.

    Exit code 2 for a mistake the user can mend, 75 where processes of the run are missing, 143 after SIGTERM, 130 after
    Ctrl-C, 1 for a fault of ours (a traceback).
    """
    _use_large_pages()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.unraisablehook = _without_late_answers
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        _fail(str(error))
    except PeersMissing as error:
        _fail(f"{error}: start all of them again", code=75)
    except TyperException as error:  # an unknown option, a missing argument
        _fail(f"{error.format_message()} (see rmft {' '.join(sys.argv[1:2])} --help)")
    except Preempted as notice:
        print(notice, file=sys.stderr)
        sys.exit(143)
    except KeyboardInterrupt:
        print("interrupted; finished checkpoints are kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if (fault := _fault_of_the_machine(error)) is None:
            raise
        _fail(fault)


def _without_late_answers(unraisable, otherwise=sys.unraisablehook) -> None:
    """Report what Python cannot raise, but for answers of the storage to a save that was given up: its error is raised."""
    if str(unraisable.exc_value) != "Event loop is closed":
        otherwise(unraisable)


def _fault_of_the_machine(error: Exception) -> str | None:
    """Return the line for a disk or a memory that is full, None for any other error."""
    if isinstance(error, OSError) and (fault := disk_fault(error)):
        where = error.filename or "a file"
        return f"{where} cannot be written ({fault}): make room, or choose another out=; the same command goes on from there"
    full = re.search("RESOURCE_EXHAUSTED|Out of memory.*", str(error))  # XLA on CPU calls it an internal error
    if isinstance(error, MemoryError) or full:
        return (f"out of memory ({(str(error) or 'host').splitlines()[0][-200:]}): lower training.batch_size or raise "
                f"training.accumulation, see rmft plan; the same command goes on from the newest checkpoint")  # fmt: skip
    return None


def _fail(message: str, code: int = 2) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
