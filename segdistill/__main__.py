"""``python -m segdistill <command>``. Commands load their module when they run, so that help answers at once."""

import argparse
import sys
import time
from pathlib import Path

from segdistill import __version__
from segdistill.errors import UserError, exit_codes


def parser() -> argparse.ArgumentParser:
    """The command line, one sub-command a stage and a few beside them."""
    from segdistill.stages import STAGES

    top = argparse.ArgumentParser(prog="segdistill", description=__doc__.split(".")[0])
    top.add_argument("--version", action="version", version=__version__)
    top.add_argument("--warm", action="store_true", help="fork from a preloaded process where one can be had")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for stage in STAGES:
        sub = commands.add_parser(stage.name, help=stage.help, description=stage.help)
        sub.add_argument("--params", type=Path, default=Path("params.yaml"), help="the parameters (%(default)s)")
        sub.add_argument("--tracker", choices=("auto", "mlflow", "jsonl", "none"), default="auto")
        if stage.per_job:
            sub.add_argument("--experiment", required=True, help="a name under experiments in the parameters")
            sub.add_argument("--seed", type=int, required=True)
        if stage.on_device:
            _add_device(sub)
        for name, path in {**stage.inputs, **stage.outputs, **stage.metrics}.items():
            sub.add_argument(f"--{name.replace('_', '-')}", dest=f"path_{name}", type=Path, metavar="PATH",
                             help=f"instead of {path}")  # fmt: skip
    data = commands.add_parser("data", help="make or import a data set").add_subparsers(dest="action", required=True)
    synth = data.add_parser("synth", help="write the synthetic streets")
    synth.add_argument("--out", type=Path, required=True)
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), default=(128, 96))
    for split in ("train", "val", "test"):
        synth.add_argument(f"--{split}", type=int, help=f"number of {split} scenes")
    importing = data.add_parser("import", help="bring a data set of a known layout into data/")
    importing.add_argument("layout", help="folder, camvid, ...")
    importing.add_argument("source", type=Path)
    importing.add_argument("--out", type=Path, required=True)
    fetching = data.add_parser("fetch", help="bring the version of a git revision from its S3 remote, verified")
    fetching.add_argument("repository", help="a git repository with data.dvc: its address, or a folder")
    fetching.add_argument("--rev", default="HEAD", help="a branch, a tag or a commit (%(default)s)")
    fetching.add_argument("--out", type=Path, required=True)
    fetching.add_argument("--patience", type=float, default=120.0, metavar="SECONDS",
                          help="how long to wait for an S3 that is away (%(default)g)")  # fmt: skip
    commands.add_parser("check", help="check params.yaml as a whole, methods included").add_argument(
        "--params", type=Path, default=Path("params.yaml")
    )
    calibrate = commands.add_parser(
        "calibrate", help="how strong each loss term of an experiment is, and which weight would do"
    )
    calibrate.add_argument("--params", type=Path, default=Path("params.yaml"), help="the parameters (%(default)s)")
    calibrate.add_argument("--experiment", required=True, help="a name under experiments in the parameters")
    calibrate.add_argument("--steps", type=int, default=200, help="training steps (%(default)s)")
    calibrate.add_argument("--seed", type=int, default=0)
    calibrate.add_argument("--strengths", type=float, nargs="+", default=[0.1, 0.3, 1.0, 3.0], metavar="R",
                           help="weighted term over cross-entropy, to print the weight for")  # fmt: skip
    calibrate.add_argument("--json", action="store_true", help="print JSON")
    _add_device(calibrate)
    methods = commands.add_parser("methods", help="the distillation methods; with a NAME: its formula and parameters")
    page = methods.add_mutually_exclusive_group()
    page.add_argument("name", nargs="?", metavar="NAME", help="a method: its formula, weights, parameters and source")
    page.add_argument("--markdown", action="store_true", help="print docs/methods.md")
    commands.add_parser("summary", help="the last comparison's table, the champion, and where the time went")
    sync = commands.add_parser("sync", help="send to MLflow what could not be sent while its server was away")
    sync.add_argument("folder", type=Path, nargs="?", default=Path("artifacts/tracking"))
    return top


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                         help="where networks run; auto: a GPU if torch can use one (%(default)s)")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for a user's mistake, 75 for stopped, 130 for Ctrl-C."""
    arguments = parser().parse_args(argv)
    try:
        with exit_codes(f"segdistill {arguments.command}"):
            from segdistill import execution

            execution.quiet_libraries()
            _dispatch(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _dispatch(arguments: argparse.Namespace) -> None:
    from segdistill.stages import BY_NAME

    if arguments.command in BY_NAME:
        _stage(arguments)
    elif arguments.command == "data" and arguments.action == "synth":
        from segdistill.data import synthetic

        samples = dict(synthetic.DEFAULT_SAMPLES)
        samples |= {split: count for split in samples if (count := getattr(arguments, split)) is not None}
        synthetic.write(arguments.out, seed=arguments.seed, size=tuple(arguments.size), samples=samples)
    elif arguments.command == "data" and arguments.action == "fetch":
        from segdistill.adapters.dvc_remote import fetch

        fetch(arguments.repository, arguments.rev, arguments.out, patience=arguments.patience)
    elif arguments.command == "data":
        from segdistill.data.importing import import_dataset

        import_dataset(arguments.layout, arguments.source, arguments.out)
    elif arguments.command == "check":
        _check(arguments.params)
    elif arguments.command == "calibrate":
        _calibrate(arguments)
    elif arguments.command == "methods":
        _methods(arguments)
    elif arguments.command == "summary":
        from segdistill.stages.summary import show

        show()
    elif arguments.command == "sync":
        _sync(arguments.folder)


def _stage(arguments: argparse.Namespace) -> None:
    from segdistill import execution
    from segdistill.config import Name, Seed, parse, read_yaml
    from segdistill.errors import nearest
    from segdistill.stages import BY_NAME, Job

    stage, started = BY_NAME[arguments.command], time.time()
    params = read_yaml(arguments.params)
    # What begins a run builds every network in outline; later stages build their own at once.
    execution.check_params(params, networks=stage.name in ("validate", "prepare", "train_teacher"), here=True)
    seed = parse(Seed, arguments.seed, "--seed") if stage.per_job else 0
    job = Job(parse(Name, arguments.experiment, "--experiment"), seed) if stage.per_job else None
    if job and job.experiment not in params["experiments"]:
        raise UserError(f"--experiment: '{job.experiment}' is unknown{nearest(job.experiment, params['experiments'])}")
    paths = {
        key.removeprefix("path_"): path for key, path in vars(arguments).items() if key.startswith("path_") and path
    }
    tracker = execution.open_tracker(arguments.tracker, execution.context(arguments.params), stage, job)
    chosen = execution.sections(stage, params, job)
    device = arguments.device if stage.on_device else "auto"
    execution.run_stage(stage, chosen, paths=paths, job=job, tracker=tracker, started=started, device=device)
    if stage.name == "register":
        from segdistill.stages.summary import show

        show()


def _calibrate(arguments: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from segdistill import execution
    from segdistill.config import Seed, parse, read_yaml
    from segdistill.errors import nearest
    from segdistill.stages import BY_NAME, calibrate
    from segdistill.stages.distill import Config, ExperimentConfig

    params, name = read_yaml(arguments.params), arguments.experiment
    execution.check_params(params, networks=False, here=True)
    if name not in params["experiments"]:
        raise UserError(f"--experiment: '{name}' is unknown{nearest(name, params['experiments'])}")
    seed = parse(Seed, arguments.seed, "--seed")
    steps = parse(calibrate.Steps, arguments.steps, "--steps")
    strengths = parse(list[calibrate.Strength], arguments.strengths, "--strengths")
    inputs = {key: Path(path) for key, path in BY_NAME["distill"].inputs.items()}
    for path in inputs.values():
        if not path.exists():
            raise UserError(f"{path}: calibrate needs it; run what makes it first: dvc repro")
    found = calibrate.run(
        parse(Config, params["distill"], "distill"), experiment=name, seed=seed, steps=steps,
        settings=parse(ExperimentConfig, params["experiments"][name], f"experiments.{name}"),
        prepared=inputs["prepared"], teacher=inputs["teacher"], device=arguments.device,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(calibrate.as_json(found, strengths), indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(calibrate.table(found, steps, strengths))
    for line in calibrate.paths(found):
        console.print(line, soft_wrap=True)


def _methods(arguments: argparse.Namespace) -> None:
    from segdistill.methods import manual

    if arguments.markdown:
        print(manual.markdown(), end="")
    elif arguments.name:
        manual.show_method(arguments.name)
    else:
        manual.show_table()


def _sync(folder: Path) -> None:
    from segdistill.adapters.mlflow_tracking import sync

    results = sync(folder)
    for result in results:
        reason = f" ({result.error})" if result.error else ""
        refused = f", refused for good: {result.refused}" if result.refused else ""
        print(f"{result.name}: {result.sent} records sent, {result.left} left{reason}{refused}")
    left = [result for result in results if result.left or result.error]
    if left:
        raise UserError(f"{folder}: {len(left)} of {len(results)} runs could not be sent whole; try again later")


def _check(path: Path) -> None:
    from segdistill import execution
    from segdistill.config import read_yaml

    execution.check_params(read_yaml(path), here=True)
    print(f"{path}: in order")


def entry() -> int:
    """Where the process begins: the warm way if asked for and possible, else here."""
    argv = sys.argv[1:]
    if argv[:1] == ["--warm"]:
        with exit_codes("segdistill"):
            from segdistill import warm

            code = warm.run(argv[1:])
            if code is not None:
                return code
    return main(argv)


if __name__ == "__main__":
    sys.exit(entry())
