"""Numbers of the original HPSv3 on a tiny Qwen2-VL. Run in an environment of its own,
see README.md."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import common
import torch

sys.path.insert(0, str(common.HERE.parent))
import hpsv3_tiny as tiny

CLASS = "Qwen2VLRewardModelBT"


def constants(file: Path) -> dict[str, str]:
    """The texts that a script assigns at its top level."""
    nodes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Assign)]
    return {
        node.targets[0].id: node.value.value
        for node in nodes
        if isinstance(node.value, ast.Constant) and isinstance(node.targets[0], ast.Name)
    }


def build(options: Any) -> Any:
    """The authors' model class on tiny random weights, in the published layout."""
    import transformers
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    names: dict[str, Any] = {
        "torch": torch, "nn": torch.nn, "transformers": transformers,
        "Qwen2VLForConditionalGeneration": Qwen2VLForConditionalGeneration,
    }  # fmt: skip
    exec("from typing import List, Optional, Dict, Union, Any", names)
    common.definitions(options.source / "model" / "qwen2vl_trainer.py", {CLASS}, names)
    words = tiny.words()
    sizes = tiny.sizes(words)
    text, vision = sizes["text"], sizes["vision"]
    rope = {"type": "mrope", "mrope_section": text.pop("mrope_section")}
    config = Qwen2VLConfig(
        **text, **sizes["ids"], rope_scaling=rope, rope_theta=1e6, vision_config=vision,
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = names[CLASS](
        config, output_dim=2, reward_token="special",
        special_token_ids=[words.convert_tokens_to_ids("<|Reward|>")], rm_head_type="ranknet",
    )  # fmt: skip
    # The head's width is written out for 7B.
    model.rm_head = tiny.head()
    return model.eval(), words


class Wide(torch.nn.Module):
    """The head on float32 inputs."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden.float())


def main() -> None:
    options = common.arguments(__doc__)
    from transformers import Qwen2TokenizerFast, Qwen2VLImageProcessor, Qwen2VLProcessor

    prompts_of = constants(options.source / "dataset" / "data_collator_qwen.py")
    spec = importlib.util.spec_from_file_location(
        "hps_utils", options.source / "dataset" / "utils.py"
    )
    assert spec is not None and spec.loader is not None
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    model, words = build(options)
    state = tiny.state({n: tuple(t.shape) for n, t in model.state_dict().items()})
    model.load_state_dict(state)
    words.__class__ = Qwen2TokenizerFast  # which the processor insists on
    words.model_input_names = ["input_ids", "attention_mask"]
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), words, chat_template=tiny.CHAT)
    scores: dict[str, list[list[float]]] = {}
    head = model.rm_head
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        network = model.to(dtype)
        # On a GPU the authors' autocast casts the head's input. It does nothing here.
        network.rm_head = Wide(head.float())
        scores[name] = []
        for image, prompt in tiny.samples():
            text = (
                prompts_of["INSTRUCTION"].format(text_prompt=prompt)
                + prompts_of["prompt_with_special_token"]
            )
            content = [
                {"type": "image", "image": image, "min_pixels": tiny.PIXELS,
                 "max_pixels": tiny.PIXELS},
                {"type": "text", "text": text},
            ]  # fmt: skip
            messages = [[{"role": "user", "content": content}]]
            pictures, _ = utils.process_vision_info(messages)
            batch = processor(
                text=processor.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                ),
                images=pictures, padding=True, return_tensors="pt",
            )  # fmt: skip
            with torch.no_grad():
                logits = network(return_dict=True, **batch)["logits"]
            scores[name].append(logits[0].double().tolist())
    result = {
        "source": {"package": "hpsv3 1.0.0", "torch": torch.__version__,
                   "transformers": __import__("transformers").__version__},
        "moments": scores,
    }  # fmt: skip
    common.write(options.out, "hpsv3", result)


if __name__ == "__main__":
    main()
