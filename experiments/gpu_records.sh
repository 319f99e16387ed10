#!/usr/bin/env bash
# The records that take GPUs, on a machine with two of them, in about an hour, or those of some stages:
#
#     bash experiments/gpu_records.sh OUT [STAGE ...]
#
# Each stage prints into OUT/NAME.log, GPU clocks and power into OUT/NAME.gpus, and is done once
# OUT/NAME.done is there: a call that was cut off, or in which a run failed, goes on with that stage.
# Copy OUT/results into experiments/results and run `python -m experiments.report`.
# EPOCHS (250) are those of LPBF, trained in bfloat16, a seed on each GPU; ABLATED (30) those of the
# ablations on elasticity.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: gpu_records.sh OUT [STAGE ...]}")
shift
mkdir -p "$out/results"
export FLARE_JAX_CACHE="$out/cache" JAX_COMPILATION_CACHE_DIR="$out/compiled"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3 XLA_PYTHON_CLIENT_PREALLOCATE=false

runs=()
run() { # GPU NAME MODULE ARGUMENTS: in the background
    local gpus=$1 name=$2
    shift 2
    CUDA_VISIBLE_DEVICES=$gpus python3 -m "experiments.$@" > "$out/$name.log" 2>&1 &
    runs+=($!)
}

wait_for_runs() { # not for what watches the GPUs
    local each
    for each in "${runs[@]}"; do wait "$each" || failed=yes; done
    runs=()
}

stage() { # NAME: of a function below, run once
    [ -e "$out/$1.done" ] && return
    nvidia-smi --query-gpu=timestamp,index,clocks.sm,power.draw,temperature.gpu,utilization.gpu \
        --format=csv,noheader -l 10 > "$out/$1.gpus" 2>&1 &
    local watch=$!
    SECONDS=0 failed=
    "$1"
    kill "$watch" 2> /dev/null
    echo "$1: $SECONDS s${failed:+, and a run of it failed: see the logs}"
    [ -n "$failed" ] || touch "$out/$1.done"
}

parts() { # half of them on each, then the record of all; meanwhile elasticity's cells on the CPU
    run 0 parts0 lpbf_parts --out "$out/parts0" --share 0 2
    run 1 parts1 lpbf_parts --out "$out/parts1" --share 1 2
    JAX_PLATFORMS=cpu python3 -c "from flare_jax.problems import elasticity as cells
for n in 1000, 2000, 4000: cells.load(cells.ElasticityConfig(num_train=n))" > "$out/made.log" 2>&1 &
    runs+=($!)
    wait_for_runs
    run 0 parts lpbf_parts --out "$out/results"
    wait_for_runs
}

elasticity() { # on one: more cells in as many steps; on the other: the ablations, side by side
    local tables="--out $out/ablations --ablations blocks heads depth --epochs ${ABLATED:-30} --seeds 1"
    for n in 1000 2000 4000; do
        run 0 elasticity$n elasticity --out "$out/elasticity$n" --num-train $n \
            --epochs $((100000 / n)) --seeds 2 --eval-every 5
    done
    for k in 0 1 2 3 4 5; do
        run 1 ablations$k elasticity $tables --share $k 6
    done
    run 0,1 compile scaling_devices --compile --threads 8
    wait_for_runs
    run 1 ablations elasticity $tables
    wait_for_runs
    cp "$out"/ablations/ablations_*.json "$out/results/"
    for n in 1000 2000 4000; do
        cp "$out/elasticity$n/elasticity.json" "$out/results/elasticity_$n.json"
    done
}

lpbf() { # a seed on each, and nothing beside it
    local options="--precision bfloat16 --epochs ${EPOCHS:-250} --seeds 1"
    run 0 lpbf0 lpbf --out "$out/lpbf0.json" $options
    run 1 lpbf1 lpbf --out "$out/lpbf1.json" $options --seed 1
    wait_for_runs
    run 0 join lpbf --out "$out/results/lpbf.json" --join "$out/lpbf0.json" "$out/lpbf1.json"
    wait_for_runs
}

cells() { # on one: twice the cells in the recipe's 250,000 steps; on the other what needs one only
    run 0 cells elasticity --out "$out/elasticity2000_long" --num-train 2000 --epochs 250 --seeds 2
    run 1 lpbf_sizes lpbf_sizes --out "$out/results/lpbf_sizes.json"
    wait "${runs[1]}" # its times are told
    run 1 bfloat16 elasticity --out "$out/elasticity1000_bfloat16" --precision bfloat16 \
        --epochs 100 --seeds 2 --eval-every 5
    wait_for_runs
    for kind in 2000_long 1000_bfloat16; do
        cp "$out/elasticity$kind/elasticity.json" "$out/results/elasticity_$kind.json"
    done
}

devices() { # both, and nothing beside it
    # all memory at once: the largest mesh needs it in one piece
    XLA_PYTHON_CLIENT_PREALLOCATE=true run 0,1 devices scaling_devices --threads 16 \
        --out "$out/results/scaling_devices.json"
    wait_for_runs
}

[ $# -gt 0 ] || set -- parts lpbf cells elasticity devices
for name; do stage "$name"; done
