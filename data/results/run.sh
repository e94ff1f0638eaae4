#!/usr/bin/env bash
# The commands that made the runs in this folder. Each part can be run by itself:
#     bash data/results/run.sh corpus|larger_corpus|pilot|later_pilot|blocks|long|gates|why
#     bash data/results/run.sh long_fast|equal|ceiling|larger|recipe|speed|residual|gpus|tables
# pilot, blocks, long, why, equal and gpus want four GPUs, gates three, later_pilot, long_fast,
# ceiling and larger two; each of their rounds takes about ten minutes, each model of larger more.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Four blocks side by side, one per GPU: GLA and Mamba2, two seeds each. Arguments: the first
# seed, then options of block.py.
round() {
    local seed=$1
    shift
    local family
    for gpu in 0 1 2 3; do
        family=gla
        if [ $gpu -gt 1 ]; then family=mamba2; fi
        CUDA_VISIBLE_DEVICES=$gpu python data/results/block.py --family=$family \
            --seed=$((seed + gpu % 2)) "$@" &
    done
    wait
}

corpus() { python data/prepare.py --packages=data/packages.txt --tokens=1.05e8; }
# 363M tokens to train on, of all packages.
larger_corpus() {
    python data/prepare.py --packages=data/packages.txt,data/packages-larger.txt \
        --out=data/packages-larger
}
pilot() { round 100 --phase=pilot; }
# Arguments: options of block.py. A block of each family, on two GPUs.
each_family() {
    CUDA_VISIBLE_DEVICES=0 python data/results/block.py --family=gla "$@" &
    CUDA_VISIBLE_DEVICES=1 python data/results/block.py --family=mamba2 "$@" &
    wait
}
later_pilot() { each_family --seed=102 --phase=pilot --out=data/results/pilot-later.jsonl; }
ceiling() { each_family --seed=70 --phase=ceiling; }
# Which of the runs that a block need not have it had was chosen by hand, see README.md here.
blocks() { for seed in 0 2 4 6 8 10; do round $seed; done; }
long() { round 20 --phase=long; }
gates() {
    for gpu in 0 1 2; do
        CUDA_VISIBLE_DEVICES=$gpu python data/results/block.py --family=gla --phase=gates \
            --seed=$((30 + gpu)) &
    done
    wait
}

# The arms with a joint norm are of a patch that is not in the repository (seeds 40 and 41).
why() {
    local seed
    for seed in 42 43 44 45 46 47 48; do
        CUDA_VISIBLE_DEVICES=$(((seed - 42) % 4)) python data/results/block.py --family=gla \
            --phase=why --seed=$seed --jobs=4 --optional=preserve-x16 &
        if [ $seed = 45 ]; then wait; fi
    done
    wait
}

long_fast() {
    for gpu in 0 1; do
        CUDA_VISIBLE_DEVICES=$gpu python data/results/block.py --family=gla --phase=long-fast \
            --seed=$((60 + gpu)) &
    done
    wait
}
equal() {
    for gpu in 0 1 2 3; do
        CUDA_VISIBLE_DEVICES=$gpu python data/results/block.py --family=mamba2 --phase=equal \
            --seed=$((60 + gpu)) &
    done
    wait
}

# Arguments: a family, its steps of pre-training, its shape. What data/recall.py prints is in
# larger.jsonl. GLA's last twelve rows are of these commands, but pre-trained on four GPUs
# (--nproc_per_node=4 --accumulate=1), each arm on one (--nproc_per_node=1 --accumulate=4), and
# without `reinit` at 5e-4 and all at 4e-3; its seven rows before: the same after 2,180 steps, at
# 1e-3 and 4e-3. Mamba2's last six: 3,780 steps and the arms in the same way; its three before:
# 2,000 steps, each arm on one GPU. The first six rows were 800 steps of data/packages without
# --compile, the next three 2,609 of 3,600.
one_larger() {
    local family=$1 steps=$2 out=out/larger-$1
    shift 2
    local train="torchrun --nproc_per_node=2 train.py --data=data/packages-larger
        --recall_tokens=0 --weight_decay=0.1 --beta1=0.9 --beta2=0.95 --clip=1
        --eval_interval=100000 --compile --out_dir=$out"
    $train --ckpt=scratch --block=$family "$@" --block_size=1024 --batch_size=256 \
        --accumulate=4 --steps=$steps --lr=2e-3 --warmup=100 --name=lpt
    for x in 4 16; do
        python expand.py --ckpt=$out/lpt.pt --every=1 --factor=$x --out=$out/preserve-x$x.pt
    done
    for init in reinit inherit; do
        python expand.py --ckpt=$out/lpt.pt --layers=9,10,11 --init=$init --out=$out/$init.pt
    done
    arm() {                             # checkpoint, learning rate, other options
        $train --ckpt=$out/$1.pt --block_size=4096 --batch_size=32 --accumulate=2 --steps=256 \
            --warmup=32 --seed=1000 --lr=$2 "${@:3}" --name=post-$1-$2
        python data/recall.py --ckpt=$out/post-$1-$2.pt --data=data/packages-larger --T=4096
    }
    for start in lpt preserve-x4 preserve-x16 reinit; do arm $start 1e-3; done
    for start in lpt preserve-x16; do arm $start 2e-3; done
    if [ $family = gla ]; then
        for start in lpt preserve-x16; do arm $start 5e-4; done
        for rate in 5e-4 1e-3 2e-3; do arm inherit $rate; done
        for rate in 5e-4 2e-3; do arm reinit $rate; done
        for start in lpt inherit reinit; do arm $start 4e-3; done
        arm preserve-x16 4e-3 --gates_rate=10       # preserve-x16-fast
    fi
}

larger() {
    one_larger gla 3840 --n_layer=12 --d_model=1024 --n_head=16 --d_mlp=0 --conv_size=4
    one_larger mamba2 3840 --n_layer=12 --d_model=1536 --headdim=64 --d_state=16 \
        --tie_embeddings --conv_size=4
}

# With two threads or with OMP_NUM_THREADS=1 alike.
recipe() {
    for seed in 0 1 2 3 4; do
        for block in gla mamba2; do
            python train.py --block=$block --seed=$seed --out_dir=out/$block-$seed
            python data/results/tables.py --recipe=out/$block-$seed --machine="$(nproc) cores"
        done
    done
}

speed() {
    python kernels.py
    python data/results/throughput.py
    python data/results/throughput.py --models=gla-340m --graph --bfloat16_residual --peers=false
    python data/results/throughput.py --models=gla-1.3b-expanded --batch_size=1 --T=65536 \
        --checkpoint_activations --peers=false
    python data/results/throughput.py --generate \
        --models=gla-1.3b,gla-1.3b-expanded,gla-1.3b-preserve,mamba2-1.3b,mamba2-1.3b-expanded
    local arms="" family arm                # what the arms of the blocks cost
    for family in gla mamba2; do
        for arm in lpt preserve-x4 preserve-x16 inherit reinit; do
            arms+=${arms:+,}evidence-$family-$arm
        done
    done
    python data/results/throughput.py --models=$arms --T=4096 --vocab_size=4096 --peers=false
    python data/results/throughput.py --models=$arms --vocab_size=4096 --generate
}

# Pre-training with the residual stream in float32 and in bfloat16, four runs on one GPU.
residual() {
    local seed bfloat16
    for seed in 50 51; do
        for bfloat16 in false true; do
            python train.py --ckpt=scratch --block=gla --n_layer=8 --d_model=512 --d_mlp=0 \
                --n_head=16 --conv_size=4 --recall_tokens=0 --weight_decay=0.1 --beta1=0.9 \
                --beta2=0.95 --clip=1 --eval_interval=100000 --block_size=1024 --batch_size=64 \
                --steps=1300 --lr=4e-3 --warmup=100 --data=data/packages --compile \
                --seed=$seed --bfloat16_residual=$bfloat16 \
                --out_dir=out/residual-$seed-$bfloat16 &
        done
    done
    wait
}

# Arguments: a preset, the number of GPUs, more options of train.py.
train_on() {
    local preset=$1 n=$2
    shift 2
    torchrun --nproc_per_node="$n" train.py --ckpt=scratch --preset="$preset" --accumulate=1 \
        --batch_size=$((16 * n)) --data=data/packages --vocab_size=32000 --steps=40 \
        --out_dir="out/gpus-$preset-$n$*" "$@"
}

gpus() {
    for preset in gla-340m mamba2-370m; do
        for n in 1 2 4; do train_on $preset $n; done
        train_on $preset 4 --shard
    done
    # The paper's step, on one GPU a quarter of it. (What was measured had no trained weights.)
    python expand.py --ckpt=fla-hub/gla-1.3B-100B --every=6 --out=out/expanded.pt
    local paper="train.py --preset=paper-gla --ckpt=out/expanded.pt --data=data/slimpajama"
    torchrun --nproc_per_node=1 $paper --batch_size=2 --accumulate=2 --out_dir=out/gpus-paper-1
    torchrun --nproc_per_node=4 $paper --out_dir=out/gpus-paper-4
    torchrun --nproc_per_node=4 $paper --shard --out_dir=out/gpus-paper-4-shard
}

tables() { python data/results/tables.py; }

case "${1:-}" in
    corpus | larger_corpus | pilot | later_pilot | blocks | long | gates | why | long_fast | \
        equal | ceiling | larger | recipe | speed | residual | gpus | tables) "$1" ;;
    *)
        echo "run.sh: name a part: corpus, larger_corpus, pilot, later_pilot, blocks, long," \
            "gates, why, long_fast, equal, ceiling, larger, recipe, speed, residual, gpus," \
            "tables" >&2
        exit 2
        ;;
esac
