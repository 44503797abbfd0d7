"""Commands: parsing only. Heavy imports happen inside a command, so that `--help` is instant."""

from __future__ import annotations

import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from archscale import terminal
from archscale.errors import INTERRUPTED, RETRY, ArchscaleError, ConfigError, explain_os_error

# Seconds that a rank waits whose error another rank reports: under torchrun, which ends it together
# with that rank, and elsewhere.
REPORTED, UNHURRIED = 60.0, 5.0

app = typer.Typer(
    help="Pre-train language models and find their scaling laws.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(
    help="Turn text into token shards and look at them.", invoke_without_command=True
)
app.add_typer(data_app, name="data")
bench_app = typer.Typer(
    help="""Measure on this machine; count what a step takes on another.

    Example: archscale bench train configs/small/hyperp_moe.yaml --set training.micro_batch=8

    Example: archscale bench step configs/orscale/1b.yaml --count --processes 8 --device h100

    Example: archscale bench data

    Example: archscale bench checkpoint configs/quickstart.yaml --set model.vocab_size=4096

    Example: archscale bench generate runs/quickstart

    Example: archscale bench gpu""",
    invoke_without_command=True,
)
app.add_typer(bench_app, name="bench")
checkpoint_app = typer.Typer(
    help="""What a run has saved: list, verify, prune, compare.

    Example: archscale checkpoint list runs/quickstart

    Example: archscale checkpoint verify runs/quickstart""",
    invoke_without_command=True,
)
app.add_typer(checkpoint_app, name="checkpoint")
config_app = typer.Typer(help="Make configs.", invoke_without_command=True)
app.add_typer(config_app, name="config")

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; repeatable."),
]
DataTokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Of another project's files: file, directory or hub name."),
]


# Names of `archscale.fit.laws.LAWS` and of the settings of fits, here so that --help needs no
# numpy; a test compares them.
Form = StrEnum("Form", ["power", "power_irreducible", "quadratic_log", "chinchilla"])
Part = StrEnum("Part", ["optimizer", "data", "schedule"])
Space = StrEnum("Space", ["log", "linear"])
Loss = StrEnum("Loss", ["squares", "huber"])
Dtype = StrEnum("Dtype", ["float32", "bfloat16"])
Cluster = StrEnum("Cluster", ["local", "slurm", "kubernetes", "skypilot"])
# Names of `archscale.bench.gpu.CHECKS`, compared likewise.
Check = StrEnum("Check", ["attention", "kernel", "smoke", "mfu", "optimizer", "moe", "hf", "all"])


def _version(asked: bool) -> None:
    """Without importing torch, which takes seconds."""
    if asked:
        from importlib.metadata import version

        import archscale

        print(f"archscale {archscale.__version__}, torch {version('torch')}")
        raise typer.Exit


def _help_unless_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.callback()
def common(
    context: typer.Context,
    # DeepSpeed's launcher passes this beside the environment variable that counts.
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Print the versions of archscale and torch.",
        ),
    ] = False,
) -> None:
    """Pre-train language models and find their scaling laws."""
    _help_unless_command(context)


data_app.callback()(_help_unless_command)
bench_app.callback()(_help_unless_command)
checkpoint_app.callback()(_help_unless_command)
config_app.callback()(_help_unless_command)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML config.")],
    set: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Run directory; default runs/<name>.")
    ] = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="Where to continue from.")
    ] = "auto",
    extend: Annotated[
        bool,
        typer.Option(
            "--extend", help="Plan rates and schedule anew over the config's length, and go on."
        ),
    ] = False,
    decay_from: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Go on from this one of a wsd or constant run, with the decay.",
        ),
    ] = None,
    reset: Annotated[
        list[Part] | None,
        typer.Option(help="With --resume PATH: what starts anew there. Repeatable."),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Write a Chrome trace of three steps after the first ten."),
    ] = False,
    profile_steps: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="Of these steps in place of those.")
    ] = None,
) -> None:
    """Train one model; resumes by itself from the newest checkpoint of its run directory.

    Example: torchrun --standalone --nproc_per_node=2 -m archscale train configs/quickstart.yaml
    """
    from archscale.train.stopping import listening

    with listening():  # also while the rest is imported, and during the report
        parts = tuple(dict.fromkeys(part.value for part in reset or []))
        wishes = {"extend": extend, "reset": parts, "decay_from": decay_from}
        asked = profile if profile_steps is None else profile_steps
        _train(config, set or [], run_dir, resume, wishes, asked)


def _train(
    config: Path,
    overrides: list[str],
    run_dir: Path | None,
    resume: str,
    wishes: dict[str, Any],
    profile: str | bool,
) -> None:
    from archscale.config import load_config

    resolved = load_config(config, overrides)
    from archscale.checkpoint.place import place_of
    from archscale.telemetry.profiling import ProfiledSteps
    from archscale.train.continuing import Wishes
    from archscale.train.trainer import train as run

    terminal.go_on_without_reader()
    given = any(
        key.strip() == "training.tokens" or (key.strip() == "training" and "tokens:" in value)
        for key, _, value in (text.partition("=") for text in overrides)
    )
    if wishes["decay_from"] is not None:
        wishes["decay_from"] = place_of(wishes["decay_from"])
    wanted = Wishes(**wishes, tokens_given=given)
    profiled = ProfiledSteps.parse(profile) if isinstance(profile, str) else None
    if profile is True:
        profiled = ProfiledSteps()
    summary = run(resolved, run_dir or Path("runs") / resolved.name, resume, wanted, profiled)
    if summary["rank"] == 0:
        if not summary["already_done"]:
            from archscale.sweep.pages import report_if_possible

            report_if_possible(Path(summary["run_dir"]))
        losses = "".join(
            f", {key} not finite" if summary[key] is None else f", {key} {summary[key]:.4f}"
            for key in ("loss", "val_loss", "val_loss_ema", "val_bits_per_byte")
            if key in summary
        )
        done = (
            "already done" if summary["already_done"] else f"finished in {summary['seconds']:.0f} s"
        )
        print(
            f"{resolved.name}: {done}: {summary['steps']} steps, {summary['tokens']:,}"
            f" tokens{losses}"
        )
        print(f"metrics {summary['run_dir']}/metrics.jsonl, checkpoint {summary['checkpoint']}")
        if (step := summary["not_finite_since"]) is not None:
            print(f"{resolved.name}: diverged: loss not finite since step {step}")


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML config.")],
    set: Overrides = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Devices, one process each; default parallel.replicate × parallel.shard."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Plan for this one, such as h100, or cpu (measured); default: compare all known."
        ),
    ] = None,
    peak: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            metavar="TFLOP/S",
            help="Dense bf16 peak of --device, for one that is not known.",
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=1e-6, metavar="GIB", help="Memory of --device, for one that is not known."
        ),
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the peak that training reaches.")
    ] = 0.4,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """What a config will train, cost and need, and every problem it has. Starts nothing.

    Example: archscale plan configs/hyperp/dense_d12.yaml --processes 8 --device h100
    """
    import json as encoder

    from archscale.config import load_config
    from archscale.plan.devices import find_device
    from archscale.plan.preflight import plan_config
    from archscale.plan.text import render

    if device is None and (peak or memory):
        raise ArchscaleError(
            "--peak and --memory describe a device", "archscale plan", "name it with --device"
        )
    chosen = None
    if device is not None:
        room = None if memory is None else round(memory * 2**30)
        chosen = find_device(device, peak=None if peak is None else peak * 1e12, memory=room)
    try:
        planned = plan_config(
            load_config(config, set or []), world_size=processes, device=chosen, mfu=mfu
        )
        problems, content = planned.problems, planned.as_dict()
    except ConfigError as error:  # not a config, so there is nothing to plan
        problems, content = error.all or [error], {}
        if json:
            print(
                encoder.dumps({"problems": [problem.as_dict() for problem in problems]}, indent=1)
            )
    if content:
        print(encoder.dumps(content, indent=1) if json else render(content))
    for problem in problems:
        print(f"archscale: {problem}", file=sys.stderr)
    if problems:
        raise typer.Exit(2)


@config_app.command("from")
def config_from(
    source: Annotated[
        str,
        typer.Argument(help="Run directory, checkpoint, or Hugging Face directory."),
    ],
) -> None:
    """Print a config that starts with these weights (training.init_from): their model, to which you
    add data, rates and length.

    Example: archscale config from runs/quickstart > configs/again.yaml
    """
    from archscale.train.initial_weights import starting_config
    from archscale.yaml_reader import yaml_text

    print(yaml_text(starting_config(source)), end="")


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="YAML grid: a base config and axes over its keys.")],
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the base; repeatable."),
    ] = None,
    sweep_dir: Annotated[
        Path | None, typer.Option(help="Sweep directory; default runs/<name>.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at once; default: all that there is room for.")
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="How often a run that crashed is tried again.")
    ] = 2,
    launcher: Annotated[
        Cluster,
        typer.Option(
            help="Who trains the runs; kubernetes and skypilot write files for you to submit."
        ),
    ] = Cluster.local,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait/--no-wait", help="With slurm: stay to the end, or leave the rest to a job."
        ),
    ] = True,
    index: Annotated[
        int | None,
        typer.Option(min=0, help="Train only this run of those that --dry-run numbers, here."),
    ] = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="Only tabulate and fit what is finished.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and what all cost; start nothing.")
    ] = False,
    continued: Annotated[bool, typer.Option("--continued", hidden=True)] = False,
) -> None:
    """Train all runs of a grid, then tabulate and fit them. The same command again skips what is
    finished and resumes the rest.

    Example: archscale sweep configs/sweeps/lr_tokens.yaml --dry-run
    """
    from archscale.sweep.run import How
    from archscale.sweep.run import sweep as run

    terminal.go_on_without_reader()
    how = How(launcher.value, jobs, retries, wait, continued)
    run(
        grid,
        set or [],
        sweep_dir=sweep_dir,
        how=how,
        dry_run=dry_run,
        collect_only=collect,
        index=index,
    )


@app.command()
def fit(
    targets: Annotated[
        list[Path],
        typer.Argument(metavar="FILE_OR_DIR...", help="CSV files, or directories of runs."),
    ],
    x: Annotated[
        list[str],
        typer.Option(
            "--x",
            metavar="COLUMN",
            help="What the law is a function of; twice for chinchilla: N, then D.",
        ),
    ],
    y: Annotated[str, typer.Option("--y", metavar="COLUMN", help="What the law predicts.")],
    form: Annotated[Form, typer.Option(help="Form of the law.")],
    group: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="A fit for each of its values; repeatable."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="With quadratic_log: a power law of the optimal x in this column.",
        ),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="That law by one fit of all points, not in two stages.")
    ] = False,
    block: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="With quadratic_log: its values, such as seeds, shift whole bowls.",
        ),
    ] = None,
    nearest: Annotated[
        int | None,
        typer.Option(
            min=3, help="With quadratic_log: only that many different x around the best one."
        ),
    ] = None,
    leverage: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B", help="How many times the x of group A group B needs for the same y."
        ),
    ] = None,
    at: Annotated[
        list[float] | None,
        typer.Option(
            metavar="X", help="Where to take the leverage; repeatable. Default: common range."
        ),
    ] = None,
    space: Annotated[
        Space | None, typer.Option(help="Residuals of ln y or of y; default by form.")
    ] = None,
    loss: Annotated[
        Loss, typer.Option(help="Loss of the residuals; huber for data with outliers.")
    ] = Loss.squares,
    delta: Annotated[
        float | None,
        typer.Option(
            min=1e-12,
            help="Of Huber's loss; default 1.345 standard deviations, estimated robustly.",
        ),
    ] = None,
    replicates: Annotated[int, typer.Option(min=99, max=100_000, help="Of the bootstrap.")] = 999,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.99, help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Fit a scaling law to CSV files or directories of runs, by group, with intervals.

    Example: archscale fit runs/batch --form power --x training.batch_tokens --y val_loss
    """
    import json as encoder

    from archscale.fit.fit import Settings
    from archscale.fit.groups import FitRequest, fit_table
    from archscale.fit.text import render
    from archscale.sweep.table import read_table

    settings = Settings(
        space and space.value, loss.value, delta, replicates, confidence, seed, nearest
    )
    fits = fit_table(
        read_table(targets),
        FitRequest(
            form.value,
            x,
            y,
            group or [],
            against=against,
            joint=joint,
            over=leverage,
            at=at or [],
            block=block,
            settings=settings,
        ),
    )
    print(encoder.dumps(fits.as_dict(), indent=1) if json else render(fits))
    if refusal := fits.refusal:
        raise refusal


GenerateTarget = Annotated[
    Path, typer.Argument(help="Run directory, checkpoint in one, or exported directory.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens to add at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]
TopK = Annotated[
    int, typer.Option(min=0, help="Sample among the k likeliest tokens only; 0: among all.")
]
TopP = Annotated[
    float,
    typer.Option(help="Of these among the likeliest that have this share of the probability."),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End before this text. Repeatable."),
]


@app.command()
def generate(
    target: GenerateTarget,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue. Repeatable.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts to continue, one a line.")
    ] = None,
    max_tokens: MaxTokens = 100,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    stop: Stop = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling, for every prompt.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts continued at a time.")] = 8,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Continue prompts with a trained model.

    Example: archscale generate runs/quickstart --prompt "def "
    """
    from archscale.inference.sampling import Sampling
    from archscale.train.prompting import Options, gather_prompts, print_continuations

    sampling = Sampling(temperature, top_k or None, top_p)
    options = Options(max_tokens, sampling, tuple(stop or ()), seed, batch)
    print_continuations(target, gather_prompts(prompt or [], prompts), options, as_json=json)


@app.command()
def chat(
    target: GenerateTarget,
    max_tokens: MaxTokens = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    stop: Stop = None,
    seed: Annotated[int, typer.Option(help="Seed of the first answer; the next has the next.")] = 0,
) -> None:
    """Talk with a trained model: it continues the text of your lines and its answers. Ctrl-C stops
    an answer, Ctrl-D ends. Without a terminal it answers the lines of standard input.

    Example: archscale chat runs/quickstart --max-tokens 50
    """
    from archscale.inference.sampling import Sampling
    from archscale.train.prompting import Options
    from archscale.train.prompting import chat as run

    sampling = Sampling(temperature, top_k or None, top_p)
    run(target, Options(max_tokens, sampling, tuple(stop or ()), seed))


@app.command()
def export(
    target: Annotated[
        Path, typer.Argument(help="Run directory, for its newest checkpoint; or a checkpoint.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write; new or empty.")],
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of the weights; default: that of the products in training."),
    ] = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest file of weights, such as 500MB.")
    ] = "5GB",
    push: Annotated[
        str | None,
        typer.Option(metavar="REPO_ID", help="Upload it to the Hugging Face hub as well."),
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="The running average of the weights (training.ema).")
    ] = False,
) -> None:
    """Write a checkpoint as a directory that transformers reads.

    Example: archscale export runs/quickstart --out exports/quickstart
    """
    from archscale.export.export import export as run
    from archscale.export.export import push as upload

    written = run(target, out, dtype=dtype and dtype.value, shard_size=shard_size, ema=ema)
    files = "1 file" if written.files == 1 else f"{written.files} files"
    what = f"step {written.step:,} as {written.architecture.sentence}"
    print(f"{out}: {what}; {written.dtype}, {files}")
    if written.warning:
        print(f"archscale: warning: {written.warning}", file=sys.stderr)
    if push is not None:
        print(upload(written.directory, push))


@app.command("eval")
def evaluate(
    target: Annotated[
        Path, typer.Argument(help="Run directory, a checkpoint in one, or an exported model.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Score the validation text of this data set. Repeatable."),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Score this file of UTF-8 text. Repeatable.")
    ] = None,
    context: Annotated[
        str, typer.Option(metavar="N,…", help="Tokens that are read at once; default the model's.")
    ] = "",
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens between windows; less than the context: they overlap."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Score so many of each data set and text; default all."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a forward pass; default as in training.")
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(metavar="TASK,…", help="Score tasks of lm-eval: names, or YAML files."),
    ] = "",
    task_path: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="With YAML files of further tasks. Repeatable."),
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in prompts; default what each task says.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score so many documents of each task; default all.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Repeat the validation of a run, or score other texts (nats per token, perplexity, bits per
    byte) and tasks of lm-eval. Results of a run also go to its evaluations.jsonl, which its report
    shows. Under torchrun or accelerate launch processes share the work.

    Example: archscale eval runs/quickstart --text README.md --context 64,256
    """
    import json as encoder

    from archscale import distributed
    from archscale.evaluation.evaluate import Wanted
    from archscale.evaluation.evaluate import evaluate as run

    wanted = Wanted(
        data=data or [],
        texts=text or [],
        contexts=_lengths(context),
        stride=stride,
        most_tokens=tokens,
        batch_size=batch,
        tasks=[name.strip() for name in tasks.split(",") if name.strip()],
        task_folders=task_path or [],
        fewshot=fewshot,
        limit=limit,
    )
    evaluated = run(target, wanted)
    if distributed.rank() == 0:
        print(encoder.dumps(evaluated.as_dict(), indent=1) if json else evaluated.table())
        evaluated.keep()
    distributed.stop()


def _lengths(text: str) -> list[int]:
    """Numbers from 1 on, separated by commas."""
    numbers = [part.strip() for part in text.split(",")] if text.strip() else []
    for part in numbers:
        if not part.isdecimal() or int(part) < 1:
            raise ConfigError(f"{part!r} is no length", "--context", "write such as 128,512")
    return [int(part) for part in numbers]


@app.command()
def report(
    run: Annotated[
        list[Path],
        typer.Argument(
            help=(
                "Directory of a run or of a sweep, which may still be going on; or several of"
                " runs, to see them side by side."
            )
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help=(
                "File to write; default RUN/report.html, for two runs RUN/report_and_<name of the"
                " other>.html, for more RUN/report_and_<name of the second>_and_<number>_more.html."
                " "
                "Figures (SVG, PNG) and tables (CSV) of a sweep lie beside it, in a folder of its"
                " name."
            )
        ),
    ] = None,
) -> None:
    """One self-contained HTML file about a run: curves, every layer and matrix, the plan beside
    what was measured. Or about a sweep: loss over FLOPs, learning-rate bowls, transfer, leverage,
    indicators, fits and runs.

    Example: archscale report runs/quickstart
    """
    from archscale.sweep.pages import write_report

    path = write_report(run, out)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="YAML study.")],
    set: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the results; default runs/<name>.")
    ] = None,
) -> None:
    """Run a study of the papers' claims: tables, figures and a summary.

    Example: archscale study configs/studies/spectral_flattening.yaml
    """
    import functools

    from archscale.study.run import run_study

    terminal.go_on_without_reader()
    run_study(file, set or [], out, functools.partial(print, flush=True))


@data_app.command()
def prepare(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    set: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one for each core.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Encode this share only, beside other machines."),
    ] = None,
    finish: Annotated[
        bool, typer.Option("--finish", help="Make the data set of all parts.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print text, tokens, disk and time; write nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Text to token shards: sources, tokenizer, training and validation split.

    The same command goes on where an earlier one was ended.

    Example: archscale data prepare data_prep/python_stdlib.yaml
    """
    import functools

    from archscale.data.preparing.prepare import prepare as run

    if part and finish:
        raise typer.BadParameter("--part and --finish exclude each other")
    if dry_run and (part or finish):
        raise typer.BadParameter("--dry-run is for the whole, without --part and --finish")
    if dry_run:
        _print_estimate(recipe, set or [], workers, json)
        return
    terminal.go_on_without_reader()
    progress = functools.partial(print, file=sys.stderr if json else sys.stdout, flush=True)
    summary = run(recipe, set or [], say=progress, workers=workers, part=part, finish=finish)
    _print_data_set(summary, json)


@data_app.command()
def inspect(
    directory: Annotated[str, typer.Argument(help="Data directory, token files, or their URL.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    tokenizer: DataTokenizer = None,
) -> None:
    """What a data directory holds, or the token files of another project.

    Example: archscale data inspect data/python_stdlib
    """
    from archscale.data.preparing.prepare import inspect as run

    _print_data_set(run(directory, tokenizer), json)


@data_app.command()
def verify(
    directory: Annotated[str, typer.Argument(help="Data directory, token files, or their URL.")],
    tokenizer: DataTokenizer = None,
) -> None:
    """Check every shard's checksum, tokenizer and token ids.

    Example: archscale data verify data/python_stdlib
    """
    from archscale.data.preparing.prepare import verify as run

    problems = run(directory, tokenizer)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(2)
    print(f"{directory}: whole")


@app.command()
def doctor() -> None:
    """What this machine has and what archscale will use.

    Example: archscale doctor
    """
    from archscale.bench.doctor import examine

    _print_table(examine())


@app.command("verify-resume")
def verify_resume(
    config: Annotated[Path, typer.Argument(help="YAML config.")],
    set: Overrides = None,
    steps: Annotated[
        int, typer.Option(min=2, help="First steps of the run, which are compared.")
    ] = 12,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Default parallel.replicate × parallel.shard, or one for each GPU, two on CPUs.",
        ),
    ] = None,
    kills: Annotated[int, typer.Option(min=1, help="Times that a run is killed.")] = 3,
    seed: Annotated[int, typer.Option(help="Random seed of the instants of killing.")] = 0,
    limit: Annotated[
        float, typer.Option(min=1, help="Seconds after which a start of a run is given up.")
    ] = 900,
    dir: Annotated[
        Path | None,
        typer.Option(help="New directory for the runs; default a temporary one in runs/."),
    ] = None,
) -> None:
    """Does a crash change anything here? Trains the first steps of a config on this machine: twice
    alike, killed with SIGKILL at random instants and started again, and resumed on another number
    of processes, in another layout, with smaller micro-batches and by the other engine. The same
    layout has to give the same bits; another one losses within 1e-5 in fp32, within 0.0078 in bf16.
    The runs are removed when all is well. Exit status 2 where a case differs.

    One machine only: jobs on several nodes are not tested.

    Example: archscale verify-resume configs/quickstart.yaml --steps 8
    """
    import functools

    from archscale.bench.verify_resume import Request
    from archscale.bench.verify_resume import verify_resume as run

    request = Request(config, set or [], steps, processes, kills, seed, limit, dir)
    print(run(request, functools.partial(print, flush=True)))


@bench_app.command("optimizer")
def bench_optimizer(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COUNTxMxN", help="Matrices; repeatable. Default 28x512x512 and 4x1024x1024."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Measurements of each arm.")] = 7,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Of the orthogonalization; repeatable.")
    ] = None,
    peers: Annotated[bool, typer.Option(help="Measure other libraries too.")] = True,
    limit: Annotated[
        float,
        typer.Option(min=1, help="Seconds that a peer's first step may take; it may compile."),
    ] = 60,
    processes: Annotated[
        int, typer.Option(min=1, help="Also the distributed step on this many ranks.")
    ] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """One optimizer step: ours and every installed peer on the same matrices, in the same run.

    Example: archscale bench optimizer --shape 28x512x512 --processes 2
    """
    from archscale.bench.optimizer import parse_shapes, report

    groups = (
        [parse_shapes(shape)]
        if shape
        else [parse_shapes(["28x512x512"]), parse_shapes(["4x1024x1024"])]
    )
    print(
        report(
            groups,
            rounds=rounds,
            dtypes=dtype or ["bfloat16", "float32"],
            peers=peers,
            limit=limit,
            processes=processes,
            as_json=json,
        )
    )


@bench_app.command("train")
def bench_train(
    config: Annotated[Path, typer.Argument(help="YAML config.")],
    set: Overrides = None,
    rounds: Annotated[int, typer.Option(min=2, help="Measurements of each model.")] = 7,
    telemetry: Annotated[
        bool, typer.Option("--telemetry", help="Also what telemetry costs.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Forward, backward and optimizer of a config's model; with experts, beside the dense model of
    equal active parameters.

    Example: archscale bench train configs/small/hyperp_moe.yaml --set training.micro_batch=8
    """
    from archscale.bench.train import report
    from archscale.config import load_config

    print(report(load_config(config, set or []), rounds=rounds, telemetry=telemetry, as_json=json))


@bench_app.command("step")
def bench_step(
    config: Annotated[Path, typer.Argument(help="YAML config.")],
    set: Overrides = None,
    count: Annotated[
        bool,
        typer.Option("--count", help="Count launches, bytes and collectives; nothing is computed."),
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Devices, one process each.")] = 1,
    device: Annotated[
        str | None,
        typer.Option(help="Turn bytes into milliseconds at this one's bandwidth, such as h100."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """What one training step launches, reads, writes and sends on an accelerator, counted without
    it.

    Example: archscale bench step configs/orscale/1b.yaml --count --processes 8 --device h100
    """
    if not count:
        raise ArchscaleError(
            "a step is counted here, not timed",
            "archscale bench step",
            "add --count, or time steps on this machine with `archscale bench train`",
        )
    from archscale.bench.step import report
    from archscale.config import load_config
    from archscale.plan.devices import DEVICES, find_device

    chosen = None if device is None else find_device(device)
    if chosen is not None and chosen.bandwidth is None:
        raise ArchscaleError(
            f"the memory bandwidth of {device} is not known",
            "--device",
            f"give one of {', '.join(DEVICES)}, or leave it out",
        )
    resolved = load_config(config, set or [])
    print(report(resolved, processes=processes, device=chosen, as_json=json))


@bench_app.command("data")
def bench_data(
    tokens: Annotated[int, typer.Option(min=100_000, help="Random tokens to read.")] = 50_000_000,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Windows of a batch.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each reader.")] = 3,
    step: Annotated[
        float, typer.Option(min=1, help="Milliseconds of the steps that wait for batches.")
    ] = 100,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Beside every installed peer, or ours alone.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """The loader beside torch's DataLoader over `datasets`, mosaicml-streaming and litdata, where
    they are installed: tokens/s, waiting, time to the first batch, memory.

    Example: archscale bench data --tokens 20000000 --context 1024
    """
    from archscale.bench.data import report

    if tokens // (context + 1) // batch < 8:
        raise ArchscaleError(
            f"{tokens:,} tokens are fewer than 8 batches of {batch} windows of {context}",
            "archscale bench data",
            "give more --tokens, or a smaller --batch or --context",
        )
    print(
        report(
            tokens=tokens,
            context=context,
            batch=batch,
            rounds=rounds,
            step=step / 1e3,
            peers=peers,
            as_json=json,
        )
    )


@bench_app.command("checkpoint")
def bench_checkpoint(
    config: Annotated[Path, typer.Argument(help="YAML config whose model is saved.")],
    set: Overrides = None,
    size: Annotated[
        float, typer.Option(min=0, help="Bytes of a second state; 0: the config's alone.")
    ] = 1e9,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 3,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Beside torch's, or ours alone.")
    ] = True,
    directory: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="On the disk to be measured."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Saving and loading beside torch.save, dcp.save and dcp.async_save: how long training stands
    still, seconds beside the disk's own, memory.

    Example: archscale bench checkpoint configs/quickstart.yaml --set model.vocab_size=4096
    """
    from archscale.bench.checkpoint import report
    from archscale.config import load_config

    print(
        report(
            load_config(config, set or []),
            size=int(size),
            rounds=rounds,
            peers=peers,
            directory=directory,
            as_json=json,
        )
    )


@bench_app.command("generate")
def bench_generate(
    target: Annotated[Path, typer.Argument(help="Run directory, or checkpoint in one.")],
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Texts at a time; repeatable. Default 1 and 8.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of every text, at the start.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="That are added to it.")] = 128,
    rounds: Annotated[int, typer.Option(min=2, help="Measurements of each.")] = 7,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Tokens per second of `archscale generate` beside those of `transformers.generate` on the
    export of the same checkpoint.

    Example: archscale bench generate runs/quickstart
    """
    from archscale.bench.generate import report

    print(
        report(
            target,
            batches=batch or [1, 8],
            prompt=prompt_tokens,
            new=new_tokens,
            rounds=rounds,
            as_json=json,
        )
    )


@bench_app.command("gpu")
def bench_gpu(
    checks: Annotated[
        list[Check] | None,
        typer.Argument(metavar="[CHECK]...", help="What to run, or all; none: list them."),
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Sizes for a CPU, not compiled: does it run?")
    ] = False,
    micro_batch: Annotated[
        int, typer.Option(min=1, help="Sequences per forward pass of the large models.")
    ] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each time.")] = 10,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """The first hours on a GPU: attention, kernel, smoke, mfu, optimizer, moe and hf, each a table.
    Its lines for CUDA have not yet run on a GPU. Rows also go to stderr as they are measured; the
    exit status is 1 where a case failed.

    Example: archscale bench gpu attention kernel
    """
    if not checks:
        from archscale.bench.gpu import listing

        print(listing())
        return
    import torch

    from archscale.bench.gpu import CHECKS, Bench, report, run_checks

    names = list(CHECKS) if Check.all in checks else [check.value for check in checks]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, tiny, micro_batch, repeats)
    rows = run_checks(names, bench)
    print(report(rows, bench, as_json=json))
    if any("failed" in row for table in rows.values() for row in table):
        raise typer.Exit(1)


@checkpoint_app.command("list")
def list_checkpoints(
    directory: Annotated[str, typer.Argument(help="Run directory, or folder of checkpoints.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What is saved, in order of step: from state.json, metrics.jsonl and the sizes of files alone.
    Below it what --resume has moved aside, and what a killed run did not finish.

    Example: archscale checkpoint list runs/quickstart
    """
    import json as encoder

    from archscale.checkpoint import listing
    from archscale.checkpoint.place import place_of

    found = listing.list_checkpoints(place_of(directory))
    print(encoder.dumps(found, indent=1) if json else listing.render_list(found))


@checkpoint_app.command("verify")
def verify_checkpoints(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="Checkpoints, run directories, or folders."),
    ],
) -> None:
    """Read every byte, compare it with its checksum, and check that every tensor is there once. Of
    a run directory all checkpoints but the abandoned ones, which are verified when named. Exit
    status 2 where one is damaged.

    Example: archscale checkpoint verify runs/quickstart
    """
    from archscale.checkpoint.integrity import verify_all
    from archscale.checkpoint.place import place_of

    verify_all([place_of(path) for path in paths], print)


@checkpoint_app.command("prune")
def prune_checkpoints(
    directory: Annotated[str, typer.Argument(help="Run directory, or folder of checkpoints.")],
    keep: Annotated[int, typer.Option(min=1, metavar="N", help="Newest ones that stay.")],
    keep_every: Annotated[
        int | None, typer.Option(min=1, metavar="M", help="Those of every M-th step stay, too.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would go; delete nothing.")
    ] = False,
) -> None:
    """Delete older checkpoints, as checkpoint.keep does while a run trains. The newest one from
    before a loss that is not finite always stays, and so does the newest whole one. Refused while
    a process trains there.

    Example: archscale checkpoint prune runs/quickstart --keep 1 --dry-run
    """
    from archscale.checkpoint.place import place_of
    from archscale.train.pruning import prune_checkpoints as run

    print(run(place_of(directory), keep, keep_every, dry_run, print).render(dry_run))


@checkpoint_app.command("diff")
def diff_checkpoints(
    first: Annotated[str, typer.Argument(metavar="A", help="Checkpoint.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Checkpoint.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Compare two checkpoints bit by bit, whatever layouts wrote them: config, step, data, guard,
    weights and optimizer state. Exit status 0 where all but the config is equal, 1 where something
    differs, 2 where one cannot be read.

    Example: archscale checkpoint diff runs/a/checkpoints/step_00000400
    runs/b/checkpoints/step_00000400
    """
    import json as encoder

    from archscale.checkpoint.difference import compare_checkpoints
    from archscale.checkpoint.place import place_of

    difference = compare_checkpoints(place_of(first), place_of(second))
    print(encoder.dumps(difference.as_dict(), indent=1) if json else difference.render())
    if not difference.same:
        raise typer.Exit(1)


@checkpoint_app.command("average")
def average_checkpoints(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Checkpoints; or run directories, for the newest."),
    ],
    out: Annotated[Path, typer.Option(help="Run directory to write; new or empty.")],
    last: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="The newest N of one run directory.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Those of these steps of one.")
    ] = None,
    ema: Annotated[
        bool,
        typer.Option("--ema", help="The running averages of training.ema; also of one alone."),
    ] = False,
) -> None:
    """The mean of several checkpoints' weights, as a run directory that export, eval and generate
    take. Checkpoints of one model, and of one run or of several.

    Example: archscale checkpoint average runs/quickstart --last 3 --out runs/averaged
    """
    from archscale.train.averaging import average_checkpoints as run
    from archscale.train.averaging import parse_steps

    chosen = None if steps is None else parse_steps(steps)
    for sentence in run(paths, out, last=last, steps=chosen, ema=ema).sentences():
        print(sentence)


def _print_estimate(recipe: Path, overrides: list[str], workers: int | None, as_json: bool) -> None:
    import json

    from archscale.data.preparing.estimate import estimate
    from archscale.data.preparing.recipe import load_recipe
    from archscale.data.summary_text import render_estimate

    expected = estimate(load_recipe(recipe, overrides), workers)
    print(json.dumps(expected, indent=1) if as_json else render_estimate(expected))


def _print_data_set(summary: dict[str, Any], as_json: bool) -> None:
    import json

    from archscale.data.summary_text import render

    if "part" in summary and not as_json:
        _print_table(summary)
        return
    print(json.dumps(summary, indent=1) if as_json else render(summary))


def _print_table(rows: dict[str, Any]) -> None:
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")


def main() -> None:
    """Entry point: an error that a user can cause ends in one line on stderr and exit status 2; a
    reader of stdout who leaves, as `head` does, in status 141, as shells say of SIGPIPE."""
    terminal.prepare()
    try:
        status = _command()
        sys.stdout.flush()
        sys.exit(status)
    except ArchscaleError as error:
        if os.environ.get("ARCHSCALE_DEBUG") == "1":
            raise
        if _reports(error) or not _another_rank_reports():
            print(f"archscale: {error}", file=sys.stderr, flush=True)
        terminal.flush()
        os._exit(error.status)  # without waiting for ranks and threads that may wait for this one
    except terminal.ReaderLeft:
        os._exit(141)
    except KeyboardInterrupt:
        print("archscale: stopped by Ctrl-C", file=sys.stderr, flush=True)
        terminal.flush()
        os._exit(INTERRUPTED)
    except OSError as error:
        if os.environ.get("ARCHSCALE_DEBUG") == "1" or isinstance(
            error, ConnectionError | TimeoutError
        ):
            raise
        cause, remedy = explain_os_error(error, "check the path")
        where = error.filename or "no file named"
        hint = "ARCHSCALE_DEBUG=1 shows where"
        print(
            f"archscale: cannot read or write: {cause} ({where}): {remedy}; {hint}",
            file=sys.stderr,
            flush=True,
        )
        terminal.flush()
        os._exit(2)
    except Exception as error:
        _end_without_the_others(error)
        # What typer raises for a wrong command line.
        if not hasattr(error, "format_message"):
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", None) or "archscale"
        print(
            f"archscale: {error.format_message().rstrip('.')} ({where}): see {where} --help",
            file=sys.stderr,
        )
        sys.exit(2)


def _end_without_the_others(error: Exception) -> None:
    """Ends this process in one line and status 1, for the launcher to start the job again, where
    the error is that another rank cannot be reached."""
    distributed = sys.modules.get("archscale.distributed")
    cause = distributed and distributed.lost_connection(error)
    if not cause or os.environ.get("ARCHSCALE_DEBUG") == "1":
        return
    time.sleep(5)  # torchrun reports the first that exits: let it be the one that failed
    print(
        f"archscale: rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} cannot reach"
        f" another rank, which has ended or is cut off: {cause}; the same command goes on from the"
        " newest checkpoint, and torchrun --max-restarts=N gives it by itself",
        file=sys.stderr,
        flush=True,
    )
    terminal.flush()
    os._exit(1)  # process groups and threads may wait for the rank that is lost


def _command() -> Any:
    """Run what the command line says; returns its exit status."""
    try:
        status = app(standalone_mode=False)
    except SystemExit as end:
        if end.code in (RETRY, INTERRUPTED):  # within the grace of who has sent a signal
            terminal.flush()
            os._exit(int(end.code))
        # Rich makes that of a pipe that broke.
        return 141 if terminal.reader_left() else end.code
    if status == INTERRUPTED:  # typer makes that of Ctrl-C
        raise KeyboardInterrupt
    return status


def _reports(error: ArchscaleError) -> bool:
    """Whether this rank prints the error: of one that all ranks share, one line."""
    distributed = sys.modules.get("archscale.distributed")
    if distributed is not None and distributed.is_distributed():
        return os.environ.get("RANK", "0") == "0" or not getattr(error, "on_every_rank", False)
    if os.environ.get("WORLD_SIZE") in (None, "", "1"):
        return True
    # Before start-up ranks fail alone: one line a machine.
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _another_rank_reports() -> bool:
    """Wait for the rank that reports the error. Torchrun ends all ranks of a machine with the first
    that exits, so the first has to be that one, which may be slower; this rank returns False where
    it was waited for in vain, because the error was this rank's own."""
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    ends_with_another = under_torchrun and os.environ.get("LOCAL_RANK", "0") != "0"
    time.sleep(REPORTED if ends_with_another else UNHURRIED)
    return not ends_with_another
