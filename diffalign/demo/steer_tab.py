"""The *Steer* tab: a population of particles, and its best beside the plain image."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..steering.lineage import trace_picture
from .engine import Engine, enlarged
from .jobs import Job
from .ui import Session, explained, inputs, score_table


def build(engine: Engine, session: Session, example: str) -> None:
    """Add the tab's components and events to the page.

    Args:
        engine (`Engine`): Models and scorers.
        session (`Session`): The visitors' jobs.
        example (`str`): The first prompt.
    """
    names = [name for name, model in engine.models.items() if model.steer is None]
    limits = engine.limits
    prompt, seed, steps, guidance, side = inputs(engine, names[0], example, "steer")
    with gr.Row():
        model = gr.Dropdown(
            names, value=names[0], label="Model", elem_id="steer-model", min_width=140
        )
        scorers = list(engine.scorers)
        scorer = gr.Dropdown(
            scorers, value=scorers[-1], label="Reward", elem_id="steer-scorer", min_width=140
        )
        particles = gr.Slider(
            2,
            limits.particles,
            value=4,
            step=1,
            label="Particles",
            elem_id="steer-particles",
            min_width=140,
        )
        lmbda = gr.Slider(
            0,
            limits.lmbda,
            value=min(2.0, limits.lmbda),
            step=0.5,
            label="Lambda",
            elem_id="steer-lambda",
            min_width=140,
        )
    with gr.Row():
        go = gr.Button("Steer", variant="primary", elem_id="steer-go")
        stop = gr.Button("Stop", variant="stop", elem_id="steer-stop")
    status = gr.Markdown(
        "The particles that promise most reward are multiplied, the others end. Every prompt "
        "costs that many images.",
        elem_id="steer-status",
    )
    trace = gr.Image(
        show_label=False,
        buttons=["fullscreen"],
        format="png",
        interactive=False,
        elem_id="steer-trace",
    )
    slider = gr.ImageSlider(
        show_label=False,
        buttons=["fullscreen"],
        format="png",
        interactive=False,
        elem_id="steer-slider",
        max_height=420,
    )
    scores = gr.Markdown(elem_id="steer-scores")

    def steer(  # type: ignore[no-untyped-def]
        prompt,
        seed,
        steps,
        guidance,
        side,
        model,
        scorer,
        particles,
        lmbda,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008
    ):
        with explained():
            image_request = engine.read(prompt, seed, steps, guidance, side)
            engine.pipe(model)
            trace_steps: list[Any] = []

            def work(job: Job) -> object:
                return engine.steer(
                    model,
                    image_request,
                    scorer=scorer,
                    num_particles=particles,
                    lmbda=lmbda,
                    job=job,
                )

            for kind, value in session.run(request, work):
                if kind == "step":
                    progress(value, desc="plain image")
                elif kind == "scored":
                    trace_steps.append(value)
                    alive = len(set(value.ancestors[0].tolist()))
                    line = (
                        f"Step {value.index}: best predicted reward "
                        f"{value.rewards[0].max():.3f}, ESS {float(value.ess[0]):.2f}, "
                        f"{alive} particles go on."
                    )
                    yield trace_picture(trace_steps), gr.skip(), gr.skip(), line
                else:
                    result, plain = value
                    best = result.best[0]
                    table = score_table(
                        engine.score([plain, best], image_request.prompt),
                        ["plain", "best particle"],
                    )
                    line = (
                        f"Seed {image_request.seed}: {int(result.num_roots[0])} of "
                        f"{particles} initial noises survive, log Z "
                        f"{float(result.log_z[0]):.2f}."
                    )
                    yield result.plot(0), (enlarged(plain), enlarged(best)), table, line

    arguments = [prompt, seed, steps, guidance, side, model, scorer, particles, lmbda]
    outputs = [trace, slider, scores, status]
    options: dict[str, Any] = {"concurrency_id": "draw", "concurrency_limit": 1}
    events = [
        go.click(steer, arguments, outputs, api_name="steer", **options),
        prompt.submit(steer, arguments, outputs, api_visibility="private", **options),
    ]
    stop.click(session.cancel, None, status, cancels=events, queue=False, api_visibility="private")
