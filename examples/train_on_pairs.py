"""Train a LoRA on preference pairs, and use it in plain diffusers.

    diffalign quickstart                    makes the pairs that are used here
    python examples/train_on_pairs.py

Yours: another `MODEL` (a Hub id, a folder, a .safetensors file) and other `PAIRS` (a
Hub id, parquet, or a folder with chosen/ and rejected/). `diffalign data inspect PAIRS`
says how they are read.
"""

from __future__ import annotations

from diffusers import DiffusionPipeline
from peft import LoraConfig

from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer, ValidationConfig
from diffalign.shapes import weights_dir

MODEL = "shapes"
PAIRS = "diffalign-quickstart/dataset"
RUN = "runs/example-pairs"

trainer = DiffusionDPOTrainer(
    model=MODEL,
    args=DiffusionDPOConfig(
        output_dir=RUN,
        overwrite_output_dir=True,
        beta=500.0,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        max_steps=60,
        per_device_train_batch_size=8,
        save_steps=20,  # goes on from here: trainer.train(resume_from_checkpoint="latest")
    ),
    train_dataset=PAIRS,
    peft_config=LoraConfig(r=16, lora_alpha=16),
    # Images drawn while it trains, judged by a scorer; the best weights are kept.
    validation=ValidationConfig(
        prompts="shapes",
        max_prompts=4,
        validation_steps=30,
        scorers=["shapes"],
        keep_best="shapes",
    ),
)
output = trainer.train()
print(f"{output.global_step} steps, accuracy {output.metrics['rewards/accuracies']:.2f}")

pipe = DiffusionPipeline.from_pretrained(weights_dir())  # diffusers alone from here on
pipe.load_lora_weights(RUN)
image = pipe("a large yellow star on the right of a black background").images[0]
image.save(f"{RUN}/star.png")
