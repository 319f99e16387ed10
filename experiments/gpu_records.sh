#!/usr/bin/env bash
# The records that take GPUs, on a machine with two of them, in about half an hour:
#
#     bash experiments/gpu_records.sh OUT
#
# Each stage prints into OUT/NAME.log and is done once OUT/NAME.done is there: a call that was cut off
# goes on with the stage it was in. What takes both GPUs goes first; programs of later stages are
# compiled meanwhile. Copy OUT/results into experiments/results and run `python -m experiments.report`.
# EPOCHS (250) are those of LPBF, trained in bfloat16, a seed on each GPU.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: gpu_records.sh OUT}")
mkdir -p "$out/results"
export FLARE_JAX_CACHE="$out/cache" JAX_COMPILATION_CACHE_DIR="$out/compiled"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3 XLA_PYTHON_CLIENT_PREALLOCATE=false

run() { # GPU NAME MODULE ARGUMENTS: in the background
    local gpus=$1 name=$2
    shift 2
    CUDA_VISIBLE_DEVICES=$gpus python3 -m "experiments.$@" > "$out/$name.log" 2>&1 &
}

stage() { # NAME: of a function below, run once
    [ -e "$out/$1.done" ] && return
    SECONDS=0
    "$1"
    echo "$1: $SECONDS s"
    touch "$out/$1.done"
}

parts() { # half of them on each
    run 0 parts0 lpbf_parts --out "$out/parts0" --share 0 2
    run 1 parts1 lpbf_parts --out "$out/parts1" --share 1 2
    wait
}

lpbf() { # a seed on each
    local options="--precision bfloat16 --epochs ${EPOCHS:-250} --seeds 1"
    run 0 lpbf0 lpbf --out "$out/lpbf0.json" $options
    run 1 lpbf1 lpbf --out "$out/lpbf1.json" $options --seed 1
    run 0,1 compile scaling_devices --compile --threads 8
    wait
    run 0 join lpbf --out "$out/results/lpbf.json" --join "$out/lpbf0.json" "$out/lpbf1.json"
    wait
}

devices() { # both, and nothing beside it
    run 0,1 devices scaling_devices --threads 16 --out "$out/results/scaling_devices.json"
    wait
}

steps() { # timed on one, trained on the other
    run 1 steps benchmark --parts step model --budget 260 --out "$out/results/benchmark_step.json"
    run 0 elasticity2000 elasticity --out "$out/elasticity2000" --num-train 2000 --epochs 80 --seeds 2
    wait
    run 0 elasticity1000 elasticity --out "$out/elasticity1000" --epochs 160 --seeds 2
    run 1 plans tune_step --out "$out/results" --dtype bfloat16
    wait
}

stage parts
stage lpbf
stage devices
stage steps
