"""``python -m segdistill <command>``. Commands load their module when they run, so that help answers at once."""

import argparse
import atexit
import gc
import importlib
import sys
from pathlib import Path

from segdistill import __version__
from segdistill.errors import BEGINS_ANEW, GOES_ON, exit_codes

RESUMED = ("prepare", "train_teacher", "distill", "tune")  # what has checkpoints, or keeps what is done


def parser() -> argparse.ArgumentParser:
    """The command line, one sub-command a stage and a few beside them."""
    from segdistill.stages import STAGES

    top = argparse.ArgumentParser(prog="segdistill", description=__doc__.split(".")[0])
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for stage in STAGES:
        sub = commands.add_parser(stage.name, help=stage.help, description=stage.help)
        sub.add_argument("--params", type=Path, default=Path("params.yaml"), help="the parameters (%(default)s)")
        sub.add_argument("--tracker", choices=("auto", "mlflow", "jsonl", "none"), default="auto")
        if stage.per_cohort:
            sub.add_argument("--seed", type=int, required=True, help="whose jobs: every experiment under run")
        if stage.on_device:
            _add_device(sub)
        for name, path in {**stage.inputs, **stage.outputs, **stage.metrics}.items():
            sub.add_argument(f"--{name.replace('_', '-')}", dest=f"path_{name}", type=Path, metavar="PATH",
                             help=f"instead of {path}")  # fmt: skip
    _add_init(commands.add_parser("init", help="write a params.yaml that fits photos and masks, and this machine"))
    data = commands.add_parser("data", help="make or import a data set").add_subparsers(dest="action", required=True)
    synth = data.add_parser("synth", help="write the synthetic streets")
    synth.add_argument("--out", type=Path, required=True)
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), default=(128, 96))
    synth.add_argument("--classes", choices=["large", "all"], default="large",
                       help="all 11 of CamVid, or the 6 large ones, the thin ones void (%(default)s)")  # fmt: skip
    for split in ("train", "val", "test"):
        synth.add_argument(f"--{split}", type=int, help=f"number of {split} scenes")
    importing = data.add_parser("import", help="bring a data set, or photos and masks, into data/")
    importing.add_argument(
        "layout", help="folder: photos and masks below one, split or not; csv: a list of pairs; or a known layout"
    )
    importing.add_argument("source", type=Path, help="a folder, a list of pairs, or an archive (zip, tar)")
    importing.add_argument("--out", type=Path, default=Path("data"), help="(%(default)s)")
    _add_wishes(importing)
    fetching = data.add_parser("fetch", help="bring the version of a git revision from its S3 remote, verified")
    fetching.add_argument("repository", help="a git repository with data.dvc: its address, or a folder")
    fetching.add_argument("--rev", default="HEAD", help="a branch, a tag or a commit (%(default)s)")
    fetching.add_argument("--out", type=Path, required=True)
    fetching.add_argument("--patience", type=float, default=120.0, metavar="SECONDS",
                          help="how long to wait for an S3 that is away (%(default)g)")  # fmt: skip
    attaching = data.add_parser("attach", help="read prepared data where they lie in S3, for a disk that is too small")
    attaching.add_argument("url", help="s3://bucket/prefix, where a folder artifacts/prepared was copied to")
    attaching.add_argument("--out", type=Path, default=Path("artifacts/prepared"), help="(%(default)s)")
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
    tune = commands.add_parser("tune", help="search each experiment's settings alike, by the validation split")
    tune.add_argument("--params", type=Path, default=Path("params.yaml"), help="the parameters (%(default)s)")
    tune.add_argument("--tracker", choices=("auto", "mlflow", "jsonl", "none"), default="auto")
    _add_device(tune)
    _add_way_out(commands)
    methods = commands.add_parser("methods", help="the distillation methods; with a NAME: its formula and parameters")
    page = methods.add_mutually_exclusive_group()
    page.add_argument("name", nargs="?", metavar="NAME", help="a method: its formula, weights, parameters and source")
    page.add_argument("--markdown", action="store_true", help="print docs/methods.md")
    manual = commands.add_parser("params", help="the keys of params.yaml; with a KEY: type, default, bounds, meaning")
    manual.add_argument("key", nargs="?", metavar="KEY", help="a section or a key, such as distill.train.iterations")
    manual.add_argument("--params", type=Path, default=Path("params.yaml"), help="whose values are shown (%(default)s)")
    manual.add_argument("--markdown", action="store_true", help="print docs/params.md")
    commands.add_parser("summary", help="the last comparison's table, the champion, and where the time went")
    sync = commands.add_parser("sync", help="send to MLflow what could not be sent while its server was away")
    sync.add_argument("folder", type=Path, nargs="?", default=Path("artifacts/tracking"))
    return top


def _add_way_out(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What is done with a trained network."""
    predict = commands.add_parser("predict", help="masks, and what else is asked for, of images of one's own")
    _add_model(predict)
    predict.add_argument("input", type=Path, metavar="INPUT",
                         help="an image, a folder of images, a .txt with one image a line, or a video")  # fmt: skip
    predict.add_argument("--out", type=Path, required=True, help="the folder to write; it must not be there yet")
    predict.add_argument("--color", action="store_true", help="masks in the colours of the classes, too")
    predict.add_argument("--overlay", action="store_true", help="those colours over the image, too")
    predict.add_argument("--confidence", action="store_true", help="the probability of each pixel's class, 255 for 1")
    predict.add_argument("--areas", choices=("csv", "parquet"), help="a table of each image's pixels a class")
    predict.add_argument("--batch-size", type=int, metavar="N", help="neighbouring images of one size go together (8)")
    predict.add_argument("--scale", type=float, metavar="F",
                         help="show images resized by this factor (as the network was scored)")  # fmt: skip
    predict.add_argument("--window", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
                         help="slide a window of this size over each image, as for large ones")  # fmt: skip
    predict.add_argument(
        "--window-stride", type=float, metavar="F", help="distance of windows, as a part of one (0.67)"
    )
    predict.add_argument("--every", type=int, default=1, metavar="N", help="every Nth frame of a video (%(default)s)")
    _add_device(predict)

    export = commands.add_parser("export", help="a network as one file, ONNX or an exported program, checked and timed")
    _add_model(export)
    export.add_argument("--out", type=Path, required=True, help="the file to write, ending with .onnx or .pt2")
    export.add_argument("--format", choices=("onnx", "pt2"), help="as --out ends")
    export.add_argument("--int8", action="store_true", help="quantised by onnxruntime, calibrated on the train split")
    export.add_argument("--max-loss", type=float, default=1.0, metavar="P",
                        help="points of validation mIoU that int8 may lose, or is refused (%(default)s)")  # fmt: skip
    export.add_argument("--calibration", type=int, default=64, metavar="N",
                        help="training images that int8 takes its ranges from (%(default)s)")  # fmt: skip
    export.add_argument(
        "--prepared", type=Path, default=Path("artifacts/prepared"), help="the data for int8 (%(default)s)"
    )
    export.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("HEIGHT", "WIDTH"),
                        help="of the image whose time is measured (512 512)")  # fmt: skip

    champion = commands.add_parser("champion", help="the registry's champion, and why; rollback: the one before")
    champion.add_argument("action", choices=("show", "rollback"), nargs="?", default="show")
    champion.add_argument("--name", help="the registered model (register.model_name)")
    champion.add_argument("--params", type=Path, default=Path("params.yaml"), help="the parameters (%(default)s)")


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a folder with a trained network, a registered model"
                         " (models:/segdistill-student@champion), or a .pt2 or .onnx file")  # fmt: skip
    command.add_argument("--student", metavar="NAME", help="which network, where the folder has several")


def _add_init(command: argparse.ArgumentParser) -> None:
    folder = "photos and masks, split or not, a known layout, or a CSV list; brought to data/ (%(default)s)"
    weights = "of encoders; auto: weights/ENCODER.safetensors, else imagenet where it can be downloaded"
    students = "small, tiny, vit, or an encoder of timm; may be given again (tiny and vit)"
    command.add_argument("folder", type=Path, nargs="?", default=Path("data"), help=folder)
    command.add_argument("--layout", metavar="NAME", help="how it is laid out, such as cityscapes (as it looks)")
    command.add_argument("--params", type=Path, default=Path("params.yaml"), help="the file to write (%(default)s)")
    command.add_argument("--student", action="append", metavar="NAME", help=students)
    command.add_argument("--teacher", metavar="NAME", help="an encoder of timm, or the folder of a trained teacher")
    command.add_argument("--time", help="how long the whole may take: 30m, 2h, 1d")
    command.add_argument("--weights", choices=("auto", "imagenet", "none"), default="auto", help=weights)
    _add_wishes(command)
    command.add_argument("--preset", metavar="NAME", help="copy presets/NAME.yaml instead")
    command.add_argument("--force", action="store_true", help="overwrite a params file with uncommitted changes")


def _add_wishes(command: argparse.ArgumentParser) -> None:
    split = "split labelled images anew, in per cent: every class near its share (70/15/15)"
    classes = "names in the order of the masks' values; for masks in colours: A=#RRGGBB,..."
    command.add_argument("--split", metavar="TRAIN/VAL/TEST", help=split)
    command.add_argument("--classes", metavar="A,B,C", help=classes)
    command.add_argument("--ignore", metavar="VALUE", help="the value, or #RRGGBB, that means no label (255)")
    command.add_argument("--group", metavar="REGEX", help="images for whose path it finds the same text share a split")
    command.add_argument("--seed", type=int, default=0, help="of the split (%(default)s)")


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                         help="where networks run; auto: a GPU if torch can use one (%(default)s)")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for a user's mistake, 75 for stopped, 130 for Ctrl-C."""
    arguments = parser().parse_args(argv)
    leave_imports_alone()
    try:
        with exit_codes(f"segdistill {arguments.command}", GOES_ON if arguments.command in RESUMED else BEGINS_ANEW):
            from segdistill import execution

            execution.quiet_libraries()
            _dispatch(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def leave_imports_alone() -> None:
    """Lets Python's cyclic garbage collection seldom walk through the million objects of imported libraries.

    It would do so some hundred times while they are imported, and once more at the end of the process: a third of what
    a command's start and end take (benchmarks/startup.py).
    """
    gc.set_threshold(50_000, 10, 10)
    atexit.register(gc.freeze)


def _dispatch(arguments: argparse.Namespace) -> None:
    from segdistill.stages import STAGES

    name = "stage" if arguments.command in {stage.name for stage in STAGES} else arguments.command
    importlib.import_module(f"segdistill.commands.{name}").command(arguments)


if __name__ == "__main__":
    sys.exit(main())
