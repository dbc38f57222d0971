"""`diffalign demo`: serve the demo page with models of this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..config.ranges import count, port, steps
from ..errors import ConfigError, UserError
from ..runtime import text_files
from ..shapes.models import FLOW_MODEL, embedded_name

AUTH = "DIFFALIGN_DEMO_AUTH"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser (`argparse.ArgumentParser`): Parser of the command.
    """
    parser.add_argument(
        "--base", default="shapes", help="Hub id, folder, shapes (default) or shapes-flow"
    )
    parser.add_argument(
        "--tuned",
        action="append",
        default=[],
        help="LoRA[@SCALE], folder, Hub id, or a YAML mapping as for diffalign compare; may be "
        "given several times",
    )
    parser.add_argument(
        "--user_adapter",
        help="folder of a PPD run on the base: after four votes visitors see images for their "
        "taste",
    )
    parser.add_argument(
        "--scorers",
        help="comma-separated names (default for shapes: shapes,shapes-clip; else none)",
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="allow scorers of ./file.py:NAME, which runs that file",
    )
    parser.add_argument(
        "--prompts",
        help="for blind votes: a set or file as for diffalign compare (default for shapes: its "
        "training prompts)",
    )
    parser.add_argument("--prompts_path", type=Path, help="file or folder of a named set")
    parser.add_argument(
        "--votes_dir",
        type=Path,
        default=Path("diffalign-votes"),
        help="where votes are kept (default: diffalign-votes)",
    )
    parser.add_argument(
        "--feedback",
        type=Path,
        help="vote on the round that this run of train.feedback: people waits for (its output "
        "folder)",
    )
    parser.add_argument(
        "--ask_reward",
        type=Path,
        help="a reward of diffalign reward train: of several pairs, the one whose vote would "
        "teach it most is voted on. An ensemble with hidden layers and a reward with users "
        "(train.head: pal) choose the one on which members or users disagree most",
    )
    parser.add_argument(
        "--ask_pairs",
        type=count(2, 1024),
        help="pairs among which --ask_reward chooses (default 8, of 8 drawn images); more take "
        "longer to draw and save more votes",
    )
    parser.add_argument(
        "--gallery_dir",
        type=Path,
        default=Path("diffalign-gallery"),
        help="where the comparisons that visitors draw are kept, for the gallery and its links "
        "(default: diffalign-gallery)",
    )
    parser.add_argument(
        "--no_gallery", action="store_true", help="keep no comparisons and have no gallery"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        action="append",
        default=[],
        help="folder of a training run, or one that holds such folders: its curves and samples "
        "are shown while it goes on; may be given several times",
    )
    parser.add_argument(
        "--uploads",
        choices=("auto", "on", "off"),
        default="auto",
        help="whether visitors may score images of their own (default auto: only if nobody but "
        "this machine reaches the page)",
    )
    parser.add_argument(
        "--no_export", action="store_true", help="visitors cannot download the votes"
    )
    parser.add_argument(
        "--export",
        type=Path,
        help="write the votes of --votes_dir as a preference parquet to this file, and do nothing "
        "else",
    )
    parser.add_argument(
        "--export_likes",
        type=Path,
        help="write the thumbs of --votes_dir as a parquet of likes and dislikes to this file, and "
        "do nothing else",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1: this machine alone)",
    )
    parser.add_argument(
        "--port", type=port, default=7860, help="port (default 7860; 0 picks a free one)"
    )
    parser.add_argument("--root_path", help="path under which a proxy shows the page")
    parser.add_argument(
        "--share", action="store_true", help="a public link through gradio's servers"
    )
    parser.add_argument(
        "--auth_file",
        type=Path,
        help=f"lines of user:password; or the same in the environment as {AUTH}",
    )
    parser.add_argument(
        "--max_steps",
        type=steps,
        default=100,
        help="sampler steps a visitor may ask for (default 100)",
    )
    parser.add_argument(
        "--max_particles",
        type=count(2, 65_536),
        default=8,
        help="particles a visitor may ask for (default 8)",
    )
    parser.add_argument(
        "--max_size",
        type=count(64, 16_384),
        default=1024,
        help="height and width a visitor may ask for (default 1024)",
    )
    parser.add_argument(
        "--queue_size", type=count(), default=64, help="requests that may wait (default 64)"
    )
    parser.add_argument("--device", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the models (default: bfloat16 on a GPU, else float32)",
    )


def run(options: argparse.Namespace) -> int:
    """Serve the page until it is interrupted, or export the votes.

    Args:
        options (`argparse.Namespace`): Options of the command.

    Returns:
        `int`: Exit code.

    Raises:
        UserError: Options, models or scorers do not fit, or gradio is missing.
    """
    for name, least in (
        ("port", 0),
        ("max_steps", 1),
        ("max_particles", 2),
        ("max_size", 64),
        ("queue_size", 1),
    ):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name}", f"expected int >= {least}, got {getattr(options, name)}")
    if options.export is not None or options.export_likes is not None:
        _export(options)
        return 0
    auth = _auth(options)
    uploads = options.uploads == "on" or (options.uploads == "auto" and _is_local(options))
    app = _app(options, uploads)
    from ..demo.app import launch

    try:
        _, url, _ = launch(
            app,
            uploads=uploads,
            server_name=options.host,
            server_port=options.port or None,
            root_path=options.root_path,
            share=options.share,
            auth=auth,
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        raise UserError(
            f"--port: cannot listen on {options.host}:{options.port} ({error}); choose another port"
        ) from None
    print(f"the demo runs at {url} (ctrl-c ends it)", flush=True)
    app.block_thread()
    return 0


def _export(options: argparse.Namespace) -> None:
    from ..demo.likes import LikeStore
    from ..demo.votes import VoteStore

    missing: list[UserError] = []
    files = [path for path in (options.export, options.export_likes) if path is not None]
    for store_class, path, what in (
        (VoteStore, options.export, "preferences"),
        (LikeStore, options.export_likes, "likes and dislikes"),
    ):
        if path is None:
            continue
        store = store_class(options.votes_dir)
        try:
            count = store.export(path)
        except UserError as error:
            missing.append(error)
            continue
        remark = ""
        if store.lost:
            remark = f"; {len(store.lost)} left out, whose pictures are lost or damaged"
        print(f"wrote {count} {what} to {path}{remark}")
    if missing and len(missing) == len(files):
        raise missing[0]
    for problem in missing:
        print(problem)


def _is_local(options: argparse.Namespace) -> bool:
    """Return whether only this machine reaches the page."""
    local = options.host in ("127.0.0.1", "localhost", "::1")
    return local and not options.share and not options.root_path


def _app(options: argparse.Namespace, uploads: bool) -> Any:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError("the demo needs gradio; pip install 'diffalign[demo]'") from None
    from ..demo.app import EXAMPLE, build_app
    from ..demo.comparisons import ComparisonStore
    from ..demo.doubt import CANDIDATES, Doubt
    from ..demo.engine import Engine, Limits
    from ..demo.train_tab import Watch
    from ..demo.votes import RoundVotes, VoteStore
    from ..evaluation.compare import read_models
    from ..runtime.devices import read_dtype

    if options.ask_pairs and not options.ask_reward:
        raise UserError("--ask_pairs: has no effect without --ask_reward, which chooses the pair")
    embedded = embedded_name(options.base) is not None
    has_lora = embedded and options.base != FLOW_MODEL
    tuned = options.tuned or ([_embedded_lora()] if has_lora else [])
    if not tuned:
        raise UserError("--tuned: name at least one model to show beside the base")
    models = read_models(options.base, tuned)
    comparisons = None if options.no_gallery else ComparisonStore(options.gallery_dir)
    runs = Watch(options.runs) if options.runs else None
    votes = (
        RoundVotes(_last_round(options.feedback))
        if options.feedback
        else VoteStore(options.votes_dir)
    )
    prompts = _prompts(options, embedded)
    names = (
        options.scorers.split(",")
        if options.scorers
        else ["shapes", "shapes-clip"]
        if embedded
        else []
    )
    limits = Limits(
        steps=options.max_steps,
        particles=options.max_particles,
        side=options.max_size,
        queue=options.queue_size,
    )
    dtype = None if options.dtype is None else read_dtype(options.dtype)
    if options.trust_remote_code:
        from ..rewards.registry import trust_files

        trust_files()
    engine = Engine(
        models,
        [n.strip() for n in names if n.strip()],
        limits=limits,
        device=options.device,
        dtype=dtype,
        user_adapter=options.user_adapter,
    )
    example = EXAMPLE if embedded or not prompts else prompts[0]
    doubt = None
    if options.ask_reward:
        doubt = Doubt(options.ask_reward, options.device, options.ask_pairs or CANDIDATES)
    return build_app(
        engine,
        prompts=prompts,
        votes=votes,
        export=not options.no_export,
        example=example,
        doubt=doubt,
        comparisons=comparisons,
        uploads=uploads,
        runs=runs,
    )


def _embedded_lora() -> dict[str, Any]:
    from ..shapes import lora_dir

    return {"name": "diffusion-dpo", "lora": str(lora_dir())}


def _last_round(run_folder: Path) -> Path:
    rounds = sorted((run_folder / "feedback").glob("round-*"))
    return rounds[-1] if rounds else run_folder / "feedback" / "round-0000"


def _prompts(options: argparse.Namespace, embedded: bool) -> list[str]:
    if options.feedback:
        return []
    if options.prompts is None:
        if not embedded:
            raise UserError(
                "--prompts: name the prompts to vote on: a set such as partiprompts, or a file"
            )
        from ..shapes.prompts import train_prompts

        # Votes may become training data, so held-out prompts are not voted on.
        return train_prompts()
    from ..data.prompt_sets import load_prompts

    return load_prompts(options.prompts, path=options.prompts_path).prompts


def _auth(options: argparse.Namespace) -> list[tuple[str, str]] | None:
    text = os.environ.get(AUTH, "")
    if options.auth_file is not None:
        text = text_files.read_text(options.auth_file, "--auth_file: ")
    pairs = [line.strip().partition(":") for line in text_files.split_lines(text) if line.strip()]
    if not all(user and password for user, _, password in pairs):
        raise UserError("--auth_file: expected lines of user:password")
    if options.auth_file is not None and not pairs:
        raise UserError("--auth_file: holds no user:password")
    return [(user, password) for user, _, password in pairs] or None
