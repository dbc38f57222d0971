"""The command line.

Exit codes: 0 done; 2 the user's mistake, told in one sentence without a traceback; 1 a
failure; 128 + n after signal n.
"""

from __future__ import annotations

import argparse
import errno
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import __version__
from ..config.ranges import count, finite, seed, steps
from ..errors import ConfigError, UserError
from ..runtime.distributed import process_rank

_PERMISSION = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FREE_SPACE = "free some space and run the command again"
_PATIENCE = 5  # seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code."""
    _calm_progress_bars()
    try:
        code = run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def _calm_progress_bars() -> None:
    """In a file, our bars write a line now and then, and the libraries' bars none."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = build_parser()
    try:
        options, rest = parser.parse_known_args(arguments)
        if rest and options.command != "train":
            parser.error(f"unknown arguments: {' '.join(rest)}")
        return options.handler(options, rest)
    except UserError as error:
        return _say(str(error), 2)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno in _PERMISSION:
            return _say(
                f"cannot write {error.filename!r} ({error.strerror}); "
                "name a folder that you may write to",
                2,
            )
        if error.errno in _NO_SPACE:
            return _say(
                f"cannot write {error.filename or 'a file'} ({error.strerror}); {_FREE_SPACE}",
                1,
            )
        if _no_space(error):
            return _say(f"cannot write a file (no space left on device); {_FREE_SPACE}", 1)
        raise
    except Exception as error:
        expected = {"CheckpointError", "NonFiniteLoss", "NonFiniteWeights"}
        if type(error).__name__ not in expected and _no_space(error):
            return _say(f"cannot write a file (no space left on device); {_FREE_SPACE}", 1)
        if type(error).__name__ == "Interrupted":
            return _say(str(error), 128 + error.signal)  # type: ignore[attr-defined]
        if type(error).__name__ in expected:
            return _say(str(error), 1)
        raise


_FULL = re.compile(
    r"No space left on device|File too large|Disk quota exceeded|database or disk is full"
    r"|requested and \d+ written|inline_container.cc.*unexpected pos",
    re.IGNORECASE,
)
# Libraries whose errors are no OSError when the disk is full.
_WRITERS = ("safetensors", "sqlite3", "pyarrow")


def _no_space(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that the disk is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        library = type(error).__module__.split(".")[0]
        if _FULL.search(str(error)) and (
            isinstance(error, (OSError, RuntimeError)) or library in _WRITERS
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _say(message: str, code: int) -> int:
    rank = process_rank()
    if rank > 0:
        if code > 128:
            return code  # a signal, which all processes got
        # Mostly all processes meet the same mistake, and the launcher ends this one
        # as soon as the first has reported it. If not, the mistake is this one's own.
        time.sleep(_PATIENCE)
        message = f"process {rank}: {message}"
    print(f"diffalign: {_one_line(message)}", file=sys.stderr, flush=True)
    return code


_LONGEST = 1500  # characters of a message


def _one_line(message: str) -> str:
    """A message as one printable line.

    Names from files may be long, and hold line breaks and control characters.
    """
    text = "".join(c if c.isprintable() or c == " " else repr(c)[1:-1] for c in message)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    encoding = sys.stderr.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class Parser(argparse.ArgumentParser):
    """Mistakes in arguments are `UserError`s, and read like all other mistakes.

    Attributes:
        fill: adds the arguments. It is called for the command that is run, so that
            no other command's modules are imported.
    """

    fill: Callable[[Parser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.fill is not None:
            fill, self.fill = self.fill, None
            fill(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """All commands; nothing heavy is imported here."""
    parser = Parser(
        prog="diffalign",
        description="Align text-to-image diffusion models with human preferences.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )

    quick = commands.add_parser(
        "quickstart",
        help="align the embedded model on a CPU in minutes and measure it",
        allow_abbrev=False,
    )
    quick.fill = _add_quickstart_options

    train = commands.add_parser(
        "train",
        help="fine-tune a model as a run file says",
        add_help=False,
        allow_abbrev=False,
    )
    train.add_argument("-h", "--help", action="store_true")
    train.add_argument("--config", type=Path)
    train.add_argument("--dry_run", action="store_true")
    train.add_argument("--print_config", action="store_true")
    train.add_argument("--accelerate_config")
    train.add_argument("--num_processes", type=count())
    train.set_defaults(handler=_train)

    sample = commands.add_parser(
        "sample", help="draw images, with a LoRA beside the base", allow_abbrev=False
    )
    sample.add_argument(
        "--model", default="shapes", help="Hub id or folder of a pipeline, or shapes (default)"
    )
    sample.add_argument(
        "--lora", help="folder or Hub id of LoRA weights; base images are drawn beside"
    )
    sample.add_argument(
        "--lora_scale", type=finite, default=1.0, help="strength of the LoRA (default 1.0)"
    )
    sample.add_argument(
        "--negative_lora",
        help="negative model (Diffusion-NPO, Self-NPO) for the unconditional branch: LoRA, "
        "or pipeline folder of full weights",
    )
    sample.add_argument(
        "--alpha",
        type=finite,
        default=1.0,
        help="share of --lora in the negative branch (default 1.0)",
    )
    sample.add_argument(
        "--beta", type=finite, default=1.0, help="share of --negative_lora in it (default 1.0)"
    )
    sample.add_argument(
        "--prompt", action="append", required=True, help="may be given several times"
    )
    sample.add_argument(
        "--num_images", type=count(), default=4, help="images per prompt (default 4)"
    )
    sample.add_argument("--seed", type=seed, default=0, help="seed of the first image (default 0)")
    sample.add_argument(
        "--num_inference_steps", type=steps, help="sampler steps (default: the pipeline's)"
    )
    sample.add_argument("--guidance_scale", type=finite, help="guidance (default: the pipeline's)")
    sample.add_argument(
        "--batch_size", type=count(), default=4, help="images per forward pass (default 4)"
    )
    sample.add_argument(
        "--output_dir",
        type=Path,
        default=Path("diffalign-samples"),
        help="default: diffalign-samples",
    )
    sample.set_defaults(handler=_sample)

    data = commands.add_parser(
        "data", help="inspect or convert preference data", allow_abbrev=False
    )
    actions = data.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=Parser
    )
    for name, text in (
        ("inspect", "what is in a dataset, and what is wrong with it"),
        ("convert", "write any layout as canonical parquet"),
    ):
        action = actions.add_parser(name, help=text, allow_abbrev=False)
        action.add_argument("source", help="Hub id, folder or file")
        action.add_argument("--split", default="train", help="default: train")
        action.add_argument(
            "--columns",
            help="canonical names to your columns, e.g. '{prompt: text, chosen: good, "
            "rejected: bad}'",
        )
        action.add_argument(
            "--ties", default="drop", choices=("drop", "keep"), help="default: drop"
        )
        action.add_argument(
            "--allow_remote_images",
            action="store_true",
            help="fetch web addresses in image columns",
        )
        action.add_argument(
            "--allow_outside_paths",
            action="store_true",
            help="open image files outside the dataset's folder",
        )
        if name == "inspect":
            action.add_argument(
                "--verify_images",
                default="full",
                choices=("full", "header"),
                help="default: full, which decodes",
            )
            action.add_argument(
                "--picture",
                type=Path,
                help="write the first group as a PNG, the preferred image on the left",
            )
        if name == "convert":
            action.add_argument("--output_dir", type=Path, required=True)
            action.add_argument(
                "--kind",
                choices=("pair", "ranked", "single", "prompt"),
                help="default: the source's own",
            )
        action.set_defaults(handler=_data)

    _add_module_commands(commands, actions)

    env = commands.add_parser("env", help="versions and devices, for a bug report")
    env.set_defaults(handler=_env)
    return parser


# Commands whose options stand beside what they run: name, module, one line of help.
_MODULE_COMMANDS = (
    (
        "compare",
        "compare",
        "compare models on the same prompts and noise: win-rates, tables, a page",
    ),
    ("score", "score", "score images with reward models"),
    (
        "serve-scorer",
        "serve_scorer",
        "offer a scorer to other processes and environments over HTTP",
    ),
    ("doctor", "doctor", "check the scorers on this machine against known numbers"),
    ("scorers", "scorers", "list the scorers, or show the card of one"),
    (
        "feedback",
        "feedback",
        "ask people which images are better, for runs that train on their votes",
    ),
    ("merge", "merge", "add up LoRAs or full weights of several runs"),
    ("demo", "demo", "a page with models side by side, blind votes and steering"),
    ("steer", "steer", "steer a model towards a reward while it samples (Feynman-Kac particles)"),
)
_DATA_COMMANDS = (
    (
        "build",
        "data_build",
        "make preference data: draw images, score them, write pairs or ranked lists",
    ),
    (
        "recaption",
        "data_recaption",
        "write pairs with two captions for DCPO: captioned, perturbed or both",
    ),
)


def _add_module_commands(commands: Any, data_actions: Any) -> None:
    for parent, entries in ((commands, _MODULE_COMMANDS), (data_actions, _DATA_COMMANDS)):
        for name, module, text in entries:
            parser = parent.add_parser(name, help=text, allow_abbrev=False)
            parser.fill = functools.partial(_add_module_arguments, name, module)


def _add_module_arguments(name: str, module_name: str, parser: Parser) -> None:
    module = import_module(f".{module_name}", __package__)
    module.add_arguments(parser)
    handler = _locked if name in _LOCKED else _plain
    parser.set_defaults(handler=functools.partial(handler, module.run))


# Commands whose output folder belongs to one run at a time.
_LOCKED = ("compare", "score", "steer", "build", "recaption")


def _plain(
    run: Callable[[argparse.Namespace], int], options: argparse.Namespace, rest: list[str]
) -> int:
    return run(options)


def _locked(
    run: Callable[[argparse.Namespace], int], options: argparse.Namespace, rest: list[str]
) -> int:
    from ..runtime.folder_lock import FolderLock

    with FolderLock(options.output_dir):
        return run(options)


def _add_quickstart_options(parser: Parser) -> None:
    import dataclasses

    from ..config.section import field_docs
    from .quickstart_config import QuickstartConfig

    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("diffalign-quickstart"),
        help="default: diffalign-quickstart",
    )
    docs = field_docs(QuickstartConfig)
    for field in dataclasses.fields(QuickstartConfig):
        text = f"{docs[field.name]} Default {field.default}."
        parser.add_argument(f"--{field.name}", default=field.default, help=text.replace("%", "%%"))
    parser.set_defaults(handler=_quickstart)


def _quickstart(options: argparse.Namespace, rest: list[str]) -> int:
    from . import quickstart
    from .quickstart_config import QuickstartConfig

    values = vars(options)
    names = QuickstartConfig.__dataclass_fields__
    try:
        config = QuickstartConfig(**{name: values[name] for name in names})
    except ConfigError as error:
        raise ConfigError(f"--{error.field}", error.problem) from None
    quickstart.run(options.output_dir, config)
    return 0


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    from ..config.yaml_text import dump_yaml
    from ..recipe import load_run, run_to_dict

    if options.help:
        print(_train_help(overrides))
        return 0
    if options.config is None and not overrides:
        raise UserError(
            "--config: name a run file, e.g. diffalign train --config "
            "configs/diffusion_dpo/shapes.yaml"
        )
    run_config = load_run(options.config, overrides)
    if options.print_config:
        print(dump_yaml(run_to_dict(run_config)), end="")
        return 0
    if options.accelerate_config or (options.num_processes or 1) > 1:
        return _launch(options, overrides)
    from .train import train_run

    return train_run(run_config, dry_run=options.dry_run)


def _launch(options: argparse.Namespace, overrides: list[str]) -> int:
    """The same program through ``accelerate launch``."""
    import subprocess

    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if options.accelerate_config:
        name = options.accelerate_config
        folder = Path(__file__).parents[1] / "accelerate_configs"
        path = Path(name) if Path(name).is_file() else folder / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
            raise UserError(f"--accelerate_config: {name!r} is neither a file nor one of {known}")
        command += ["--config_file", str(path)]
    if options.num_processes:
        command += ["--num_processes", str(options.num_processes)]
    command += ["-m", "diffalign", "train"]
    if options.config:
        command += ["--config", str(options.config)]
    return subprocess.call(command + (["--dry_run"] if options.dry_run else []) + overrides)


def _train_help(overrides: list[str]) -> str:
    """All options of a run file, or with `--method NAME` those of one method."""
    from ..config.section import section_help
    from ..data.config import DataConfig
    from ..methods import METHODS, config_class
    from ..training.sections import HubConfig, LoraSection, ValidationConfig

    method = dict(pairwise(overrides)).get("--method")
    text = [
        "usage: diffalign train --config FILE [--dry_run] [--print_config]",
        "                       [--accelerate_config NAME] [--num_processes N]",
        "                       [--SECTION.FIELD VALUE ...]",
        "",
        "Any field of a run file can be given on the command line, e.g. --model FOLDER",
        "--train.beta 2000 --lora.r 8.",
        "--dry_run does one batch forward and backward and says what the run would be.",
        "--print_config writes the whole run file, with options and defaults, and ends.",
        "--method NAME --help shows the options of one method.",
        f"methods: {', '.join(METHODS)}",
    ]
    sections = {
        "lora": LoraSection,
        "data": DataConfig,
        "validation": ValidationConfig,
        "hub": HubConfig,
    }
    for name, cls in sections.items():
        text += ["", f"{name}:", section_help(cls, name)]
    for name in [method] if method in METHODS else METHODS:
        text += ["", f"train (method: {name}):", section_help(config_class(name), "train")]
    return "\n".join(text)


def _sample(options: argparse.Namespace, rest: list[str]) -> int:
    from .sample import sample

    sample(options)
    return 0


def _data(options: argparse.Namespace, rest: list[str]) -> int:
    from ..data import convert, format_inspection, load_preferences
    from ..data.config import read_columns
    from ..data.inspect import first_group_picture, inspect

    inspecting = options.action == "inspect"
    dataset = load_preferences(
        options.source,
        split=options.split,
        columns=read_columns(options.columns),
        ties=options.ties,
        # Inspecting shows what is broken, so no share of broken rows is too large. It
        # decodes by itself.
        max_broken_fraction=1.0 if inspecting else 0.05,
        verify_images="header" if inspecting else "full",
        allow_remote_images=options.allow_remote_images,
        allow_outside_paths=options.allow_outside_paths,
        verbose=not inspecting,
    )
    if inspecting:
        print(format_inspection(inspect(dataset, decode=options.verify_images == "full")))
        if options.picture is not None:
            print(f"wrote {first_group_picture(dataset, options.picture)}")
    else:
        print(f"wrote {convert(dataset, options.output_dir, kind=options.kind)}")
    return 0


def _env(options: argparse.Namespace, rest: list[str]) -> int:
    import platform

    import torch

    from ..runtime.versions import versions

    for name, version in versions().items():
        print(f"- {name}: {version}")
    print(f"- platform: {platform.platform()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"- devices: {', '.join(devices) or f'cpu ({torch.get_num_threads()} threads)'}")
    return 0


if __name__ == "__main__":
    main()
