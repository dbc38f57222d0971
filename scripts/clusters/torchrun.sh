#!/bin/bash
# Two machines with eight GPUs each, started by hand. Run it on both, with the same
# address and a number of its own on each:
#
#   MASTER=10.0.0.1 NODE=0 scripts/clusters/torchrun.sh configs/diffusion_dpo/sdxl_full.yaml
#   MASTER=10.0.0.1 NODE=1 scripts/clusters/torchrun.sh configs/diffusion_dpo/sdxl_full.yaml
#
# CONFIG is ddp, fsdp2, hsdp, zero2 or a file. Not run here: one machine without GPUs.
set -euo pipefail
: "${MASTER:?address of the first machine}" "${NODE:?number of this machine, from 0}"
folder=$(python -c "import diffalign, pathlib; print(pathlib.Path(diffalign.__file__).parent)")
exec accelerate launch \
  --config_file "$folder/accelerate_configs/${CONFIG:-ddp}.yaml" \
  --num_machines "${NODES:-2}" --num_processes "$(( ${NODES:-2} * ${GPUS:-8} ))" \
  --machine_rank "$NODE" --main_process_ip "$MASTER" --main_process_port "${PORT:-29500}" \
  scripts/train.py --config "$@"
