#!/usr/bin/env bash
# Every command that made a report of this folder, runnable from the root of the repository:
#     bash assets/reports/runs.sh
# It trains 105 models and takes days on two cores. Reports go to out/reports, not over those here.
# A report names the commit that made it; those without one are from 64e919d or before. Their runs had one
# rate for all, --lem-lr-factor 1 today, which gives the same bits on one machine, except for --prior-from: those
# had no MLP. Lines that begin with a commit need its --interval or --guide-on, which have been removed since.
# AdamW's second beta was 0.999 in all runs but those named beta95.
# cifar10/train is CIFAR-10 as a folder for each class.
set -eu
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
mkdir -p out/reports

# train RUN STEPS FLAGS: trains a model, and keeps the weights after 2,500, 5,000, 7,500, ... steps.
train() {
  run=$1; steps=$2; shift 2
  python train.py --out "out/$run" --steps "$steps" --keep-every 2500 --resume --beta2 0.999 "$@"
}

# report NAME RUN STEP COMMAND FLAGS: evaluates the weights of that step.
report() {
  name=$1; ckpt=$(printf "out/%s/ema-%07d.pt" "$2" "$3"); command=$4; shift 4
  python evaluate.py "$command" --ckpt "$ckpt" --out "out/reports/$name.json" "$@"
}

# The default since 2026-12-01: beta2 = 0.95, and LEM at a quarter of the rate.

train K1-beta95-seed0 2500 --class-groups 1 --seed 0 --beta2 0.95 --lem-lr-factor 0.25
report groups1-beta95-0-2500 K1-beta95-seed0 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1

train K1-beta95-seed1 10000 --class-groups 1 --seed 1 --beta2 0.95 --lem-lr-factor 0.25
report groups1-beta95-1-10000 K1-beta95-seed1 10000 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1
report groups1-beta95-1-10000-wide K1-beta95-seed1 10000 stages --stages 2 --cfg 8 11 16 22 --cfg-stage1
report groups1-beta95-1-2500 K1-beta95-seed1 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1

train K1-beta95-seed2 2500 --class-groups 1 --seed 2 --beta2 0.95 --lem-lr-factor 0.25
report groups1-beta95-2-2500 K1-beta95-seed2 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1

train K1-fitv2-beta95-seed1 10000 --model FiTv2-Ti --class-groups 1 --seed 1 --beta2 0.95
report groups1-fitv2-beta95-1-10000 K1-fitv2-beta95-seed1 10000 stages --cfg-stage1  --steps 40
report groups1-fitv2-beta95-1-2500 K1-fitv2-beta95-seed1 2500 stages --cfg-stage1  --steps 40

train K1-same-beta95-seed1 2500 --class-groups 1 --seed 1 --beta2 0.95 --lem-lr-factor 1
report groups1-same-beta95-1-2500 K1-same-beta95-seed1 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1

train K10-beta95-seed0 10000 --class-groups 10 --seed 0 --beta2 0.95 --lem-lr-factor 0.25
report groups10-beta95-0-10000 K10-beta95-seed0 10000 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4
report groups10-beta95-0-10000-wide K10-beta95-seed0 10000 stages --stages 2 --cfg 2.5 --cfg-stage1 1.25 1.75
report groups10-beta95-0-2500 K10-beta95-seed0 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4
report groups10-beta95-0-5000 K10-beta95-seed0 5000 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4
report probe-beta95-0-10000 K10-beta95-seed0 10000 probe

train K10-beta95-seed1 2500 --class-groups 10 --seed 1 --beta2 0.95 --lem-lr-factor 0.25
report groups10-beta95-1-2500 K10-beta95-seed1 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4

train K10-beta95-seed2 2500 --class-groups 10 --seed 2 --beta2 0.95 --lem-lr-factor 0.25
report groups10-beta95-2-2500 K10-beta95-seed2 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4

train K10-fitv2-beta95-seed0 10000 --model FiTv2-Ti --class-groups 10 --seed 0 --beta2 0.95
report groups10-fitv2-beta95-0-10000 K10-fitv2-beta95-seed0 10000 stages --cfg-stage1 1.5 2 3 4 --steps 40
report groups10-fitv2-beta95-0-10000-wide K10-fitv2-beta95-seed0 10000 stages --cfg-stage1 1.25 1.75 --steps 40
report groups10-fitv2-beta95-0-2500 K10-fitv2-beta95-seed0 2500 stages --cfg-stage1 1.5 2 3 4 --steps 40

train K10-half-beta95-seed0 2500 --class-groups 10 --seed 0 --beta2 0.95 --lem-lr-factor 0.5
report groups10-half-beta95-0-2500 K10-half-beta95-seed0 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4

train K10-same-beta95-seed0 2500 --class-groups 10 --seed 0 --beta2 0.95 --lem-lr-factor 1
report groups10-same-beta95-0-2500 K10-same-beta95-seed0 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4

train K2-beta95-seed0 2500 --class-groups 2 --seed 0 --beta2 0.95 --lem-lr-factor 0.25
report groups2-beta95-0-2500 K2-beta95-seed0 2500 stages --stages 2 --cfg 1 2 3 4 --cfg-stage1 2 3 4 6

# What came before.

train K1-quarter-n1-seed1 10000 --class-groups 1 --seed 1 --lem-lr-factor 0.25 --latent-tokens 1
report groups1-quarter-n1-1-10000 K1-quarter-n1-seed1 10000 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4
report groups1-quarter-n1-1-2500 K1-quarter-n1-seed1 2500 stages --stages 2 --cfg 1 2 3 4 --cfg-stage1 1.5 2 3 4

train K1-quarter-seed0 10000 --class-groups 1 --seed 0 --lem-lr-factor 0.25
report groups1-quarter0-10000 K1-quarter-seed0 10000 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4
report groups1-quarter0-2500 K1-quarter-seed0 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6

train K1-quarter-seed1 10000 --class-groups 1 --seed 1 --lem-lr-factor 0.25
report groups1-quarter1-10000 K1-quarter-seed1 10000 stages --stages 2 --cfg 1 1.5 2 3 4 6
report groups1-quarter1-2500 K1-quarter-seed1 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6
report groups1-quarter1-5000 K1-quarter-seed1 5000 stages --stages 2 --cfg 1 1.5 2 3 4 6

train K1-quarter-seed2 10000 --class-groups 1 --seed 2 --lem-lr-factor 0.25
report groups1-quarter2-10000 K1-quarter-seed2 10000 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4
report groups1-quarter2-2500 K1-quarter-seed2 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6

train cifar-K1-quarter-n8-seed0 10000 --class-groups 1 --seed 0 --lem-lr-factor 0.25 --latent-tokens 8 --data cifar10/train --image-size 16 --patch-size 4
report cifar-groups1-quarter-n8-0-10000-wide cifar-K1-quarter-n8-seed0 10000 stages --stages 2 --cfg 11 16 --cfg-stage1 1.5 2 3 4
report cifar-groups1-quarter-n8-0-10000 cifar-K1-quarter-n8-seed0 10000 stages --stages 2 --cfg 1 2 3 4 6 8 --cfg-stage1 1.5 2 3 4
report cifar-groups1-quarter-n8-0-2500 cifar-K1-quarter-n8-seed0 2500 stages --stages 2 --cfg 1 4 6 8 11 --cfg-stage1 1.5 2 3 4

train cifar-K1-quarter-seed0 20000 --class-groups 1 --seed 0 --lem-lr-factor 0.25 --data cifar10/train --image-size 16 --patch-size 4
report cifar-groups1-quarter0-10000-wide cifar-K1-quarter-seed0 10000 stages --stages 2 --cfg 8 11 --cfg-stage1 1.5 2 3 4
report cifar-groups1-quarter0-10000 cifar-K1-quarter-seed0 10000 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4
report cifar-groups1-quarter0-20000 cifar-K1-quarter-seed0 20000 stages --stages 2 --cfg 1 4 6 8 11 --cfg-stage1 1.5 2 3 4
report cifar-groups1-quarter0-2500 cifar-K1-quarter-seed0 2500 stages --stages 2 --cfg 1 2 3 4 6 8 --cfg-stage1 1.5 2 3 4
report cifar-groups1-quarter0-5000 cifar-K1-quarter-seed0 5000 stages --stages 2 --cfg 1 2 3 4 6 8 --cfg-stage1 1.5 2 3 4

train cifar-K1-quarter-seed1 10000 --class-groups 1 --seed 1 --lem-lr-factor 0.25 --data cifar10/train --image-size 16 --patch-size 4
report cifar-groups1-quarter1-10000 cifar-K1-quarter-seed1 10000 stages --stages 2 --cfg 1 4 6 8 11 --cfg-stage1 1.5 2 3 4
report cifar-groups1-quarter1-2500 cifar-K1-quarter-seed1 2500 stages --stages 2 --cfg 1 2 3 4 6 8 --cfg-stage1 1.5 2 3 4
report cifar-groups1-quarter1-5000 cifar-K1-quarter-seed1 5000 stages --stages 2 --cfg 1 2 3 4 6 8 --cfg-stage1 1.5 2 3 4

train K2-quarter-seed0 10000 --class-groups 2 --seed 0 --lem-lr-factor 0.25
report groups2-quarter0-10000 K2-quarter-seed0 10000 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4 6
report groups2-quarter0-2500-wide K2-quarter-seed0 2500 stages --stages 2 --cfg  --cfg-stage1 8 11
report groups2-quarter0-2500 K2-quarter-seed0 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4 6

train K2-quarter-seed1 2500 --class-groups 2 --seed 1 --lem-lr-factor 0.25
report groups2-quarter1-2500-wide K2-quarter-seed1 2500 stages --stages 2 --cfg  --cfg-stage1 8 11
report groups2-quarter1-2500 K2-quarter-seed1 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4 6

train K2-quarter-seed2 2500 --class-groups 2 --seed 2 --lem-lr-factor 0.25
report groups2-quarter2-2500-wide K2-quarter-seed2 2500 stages --stages 2 --cfg  --cfg-stage1 8 11
report groups2-quarter2-2500 K2-quarter-seed2 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4 6

train K10-quarter-seed0 20000 --class-groups 10 --seed 0 --lem-lr-factor 0.25
report groups10-quarter0-10000 K10-quarter-seed0 10000 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4 6
report groups10-quarter0-20000 K10-quarter-seed0 20000 stages --stages 2 --cfg 1 2 3 4 6 --cfg-stage1 1.5 2
report groups10-quarter0-2500 K10-quarter-seed0 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4 6
report groups10-quarter0-5000 K10-quarter-seed0 5000 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4 6

train K10-quarter-seed1 10000 --class-groups 10 --seed 1 --lem-lr-factor 0.25
report groups10-quarter1-10000 K10-quarter-seed1 10000 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4 6
report groups10-quarter1-2500 K10-quarter-seed1 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4 6

train K10-quarter-seed2 10000 --class-groups 10 --seed 2 --lem-lr-factor 0.25
report groups10-quarter2-10000 K10-quarter-seed2 10000 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4 6
report groups10-quarter2-2500 K10-quarter-seed2 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4 6

train cifar-K10-quarter-n8-seed0 10000 --class-groups 10 --seed 0 --lem-lr-factor 0.25 --latent-tokens 8 --data cifar10/train --image-size 16 --patch-size 4
report cifar-groups10-quarter-n8-0-10000 cifar-K10-quarter-n8-seed0 10000 stages --stages 2 --cfg 1 2 3 4 6 8 --cfg-stage1 1.5 2 3 4

train cifar-K10-quarter-seed0 10000 --class-groups 10 --seed 0 --lem-lr-factor 0.25 --data cifar10/train --image-size 16 --patch-size 4
report cifar-groups10-quarter0-10000 cifar-K10-quarter-seed0 10000 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4 6
report cifar-groups10-quarter0-2500 cifar-K10-quarter-seed0 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4 6
report probe-cifar-quarter0-10000 cifar-K10-quarter-seed0 10000 probe
report reconstruct-cifar-quarter0-10000 cifar-K10-quarter-seed0 10000 reconstruct --cfg 1 1.5 2 3 4 6

train K1-half-seed0 2500 --class-groups 1 --seed 0 --lem-lr-factor 0.5
report groups1-half0-2500 K1-half-seed0 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4

train K1-half-seed1 2500 --class-groups 1 --seed 1 --lem-lr-factor 0.5
report groups1-half1-2500 K1-half-seed1 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4

train K1-half-seed2 2500 --class-groups 1 --seed 2 --lem-lr-factor 0.5
report groups1-half2-2500 K1-half-seed2 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4

train K2-half-seed0 2500 --class-groups 2 --seed 0 --lem-lr-factor 0.5
report groups2-half0-2500 K2-half-seed0 2500 stages --stages 2 --cfg 1 3 4 6 --cfg-stage1 8 11

train K2-half-seed1 2500 --class-groups 2 --seed 1 --lem-lr-factor 0.5
report groups2-half1-2500 K2-half-seed1 2500 stages --stages 2 --cfg 1 3 4 6 --cfg-stage1 8 11

train K2-half-seed2 2500 --class-groups 2 --seed 2 --lem-lr-factor 0.5
report groups2-half2-2500 K2-half-seed2 2500 stages --stages 2 --cfg 1 3 4 6 --cfg-stage1 8 11

train K10-half-seed0 2500 --class-groups 10 --seed 0 --lem-lr-factor 0.5
report groups10-half0-2500 K10-half-seed0 2500 stages --stages 2 --cfg 1 2 3 4 --cfg-stage1 2 3 4

train K10-half-seed1 2500 --class-groups 10 --seed 1 --lem-lr-factor 0.5
report groups10-half1-2500 K10-half-seed1 2500 stages --stages 2 --cfg 1 2 3 4 --cfg-stage1 2 3 4

train K10-half-seed2 2500 --class-groups 10 --seed 2 --lem-lr-factor 0.5
report groups10-half2-2500 K10-half-seed2 2500 stages --stages 2 --cfg 1 2 3 4 --cfg-stage1 2 3 4

train K1-fitv2-seed0 10000 --model FiTv2-Ti --class-groups 1 --seed 0
report groups1-fit0-10000 K1-fitv2-seed0 10000 stages --steps 40
report groups1-fit0-2500 K1-fitv2-seed0 2500 stages --steps 40

train K1-fitv2-seed1 10000 --model FiTv2-Ti --class-groups 1 --seed 1
report groups1-fit1-10000 K1-fitv2-seed1 10000 stages --steps 40
report groups1-fit1-2500 K1-fitv2-seed1 2500 stages --steps 40
report groups1-fitv2-1-10000 K1-fitv2-seed1 10000 stages --steps 40
report groups1-fitv2-1-2500 K1-fitv2-seed1 2500 stages --steps 40
report groups1-fitv2-1-5000 K1-fitv2-seed1 5000 stages --steps 40

train K1-fitv2-seed2 10000 --model FiTv2-Ti --class-groups 1 --seed 2
report groups1-fit2-10000 K1-fitv2-seed2 10000 stages --steps 40
report groups1-fit2-2500 K1-fitv2-seed2 2500 stages --steps 40

train K1-means-seed0 2500 --class-groups 1 --seed 0 --lem-lr-factor 1 --prior-from means
report groups1-means0-2500 K1-means-seed0 2500 stages --stages 2 --cfg 1 3 4 5 6 8 10

train K1-means-seed1 2500 --class-groups 1 --seed 1 --lem-lr-factor 1 --prior-from means
report groups1-means1-2500 K1-means-seed1 2500 stages --stages 2 --cfg 1 3 4 5 6 8 10

train K1-means-seed2 2500 --class-groups 1 --seed 2 --lem-lr-factor 1 --prior-from means
report groups1-means2-2500 K1-means-seed2 2500 stages --stages 2 --cfg 1 3 4 5 6 8 10

train K1-n1-seed0 2500 --class-groups 1 --seed 0 --lem-lr-factor 1 --latent-tokens 1
report groups1-n1-0-2500 K1-n1-seed0 2500 stages --stages 2 --cfg 1 3 4 5 6 8

train K1-n1-seed1 2500 --class-groups 1 --seed 1 --lem-lr-factor 1 --latent-tokens 1
report groups1-n1-1-2500 K1-n1-seed1 2500 stages --stages 2 --cfg 1 3 4 5 6 8

train K1-n1-seed2 2500 --class-groups 1 --seed 2 --lem-lr-factor 1 --latent-tokens 1
report groups1-n1-2-2500 K1-n1-seed2 2500 stages --stages 2 --cfg 1 3 4 5 6 8

train K1-patches-seed0 2500 --class-groups 1 --seed 0 --lem-lr-factor 1 --prior-from patches
report groups1-patches0-2500 K1-patches-seed0 2500 stages --stages 2 --cfg 1 1.5 2 3

train K1-patches-seed1 2500 --class-groups 1 --seed 1 --lem-lr-factor 1 --prior-from patches
report groups1-patches1-2500 K1-patches-seed1 2500 stages --stages 2 --cfg 1 1.5 2 3

train K1-patches-seed2 2500 --class-groups 1 --seed 2 --lem-lr-factor 1 --prior-from patches
report groups1-patches2-2500 K1-patches-seed2 2500 stages --stages 2 --cfg 1 1.5 2 3

train K1-same-lr0.0007-seed1 2500 --class-groups 1 --seed 1 --lem-lr-factor 1 --lr 0.0007
report groups1-lr0.0007-1-2500 K1-same-lr0.0007-seed1 2500 stages --stages 2 --cfg 1 3 4 6 --cfg-stage1 1.5 2 3 4

train K1-same-lr0.0014-seed1 2500 --class-groups 1 --seed 1 --lem-lr-factor 1 --lr 0.0014
report groups1-lr0.0014-1-2500 K1-same-lr0.0014-seed1 2500 stages --stages 2 --cfg 1 3 4 6 --cfg-stage1 1.5 2 3 4

train K1-same-seed0 10000 --class-groups 1 --seed 0 --lem-lr-factor 1
report groups1-lem0-10000 K1-same-seed0 10000 stages --stages 2 --cfg 1 2 3 4 5 6 8
report groups1-lem0-2500 K1-same-seed0 2500 stages --stages 2 --cfg 1 2 3 4 5 6 8

train K1-same-seed1 10000 --class-groups 1 --seed 1 --lem-lr-factor 1
report groups1-lem1-10000-wide K1-same-seed1 10000 stages --stages 2 --cfg 8 11 15
report groups1-lem1-10000 K1-same-seed1 10000 stages --stages 2 --cfg 1 2 3 4 5 6 8
report groups1-lem1-2500 K1-same-seed1 2500 stages --stages 2 --cfg 1 2 3 4 5 6 8
report groups1-same1-2500 K1-same-seed1 2500 stages --stages 2 --cfg 1 3 4 6 8 --cfg-stage1 1.5 2 3 4

train K1-same-seed2 10000 --class-groups 1 --seed 2 --lem-lr-factor 1
report groups1-lem2-10000 K1-same-seed2 10000 stages --stages 2 --cfg 1 2 3 4 5 6 8 11
report groups1-lem2-2500 K1-same-seed2 2500 stages --stages 2 --cfg 1 2 3 4 5 6 8

train cifar-K1-fitv2-seed0 20000 --model FiTv2-Ti --class-groups 1 --seed 0 --data cifar10/train --image-size 16 --patch-size 4
report cifar-groups1-fitv2-0-10000 cifar-K1-fitv2-seed0 10000 stages --cfg-stage1 1.5 2 3 4 --steps 40
report cifar-groups1-fitv2-0-20000 cifar-K1-fitv2-seed0 20000 stages --cfg-stage1 1.5 2 3 4 --steps 40
report cifar-groups1-fitv2-0-2500 cifar-K1-fitv2-seed0 2500 stages --cfg-stage1 1.5 2 3 4 --steps 40
report cifar-groups1-fitv2-0-5000 cifar-K1-fitv2-seed0 5000 stages --cfg-stage1 1.5 2 3 4 --steps 40
report steps60-cifar-groups1-fitv2-0-10000 cifar-K1-fitv2-seed0 10000 stages --cfg-stage1 1.5 2 3 4 --steps 60
report steps60-cifar-groups1-fitv2-0-20000 cifar-K1-fitv2-seed0 20000 stages --cfg-stage1 1.5 2 3 4 --steps 60

train cifar-K1-fitv2-seed1 10000 --model FiTv2-Ti --class-groups 1 --seed 1 --data cifar10/train --image-size 16 --patch-size 4
report cifar-groups1-fitv2-1-10000 cifar-K1-fitv2-seed1 10000 stages --cfg-stage1 1.5 2 3 4 --steps 40
report cifar-groups1-fitv2-1-2500 cifar-K1-fitv2-seed1 2500 stages --cfg-stage1 1.5 2 3 4 --steps 40
report cifar-groups1-fitv2-1-5000 cifar-K1-fitv2-seed1 5000 stages --cfg-stage1 1.5 2 3 4 --steps 40
report steps60-cifar-groups1-fitv2-1-10000 cifar-K1-fitv2-seed1 10000 stages --cfg-stage1 1.5 2 3 4 --steps 60

train K2-fitv2-seed0 10000 --model FiTv2-Ti --class-groups 2 --seed 0
report groups2-fit0-10000-wide K2-fitv2-seed0 10000 stages --cfg-stage1 1.25 1.5 --steps 40
report groups2-fit0-10000 K2-fitv2-seed0 10000 stages --cfg-stage1 2 3 4 5 6 --steps 40
report groups2-fit0-2500 K2-fitv2-seed0 2500 stages --cfg-stage1 2 3 4 5 6 --steps 40
report groups2-fitv2-0-10000 K2-fitv2-seed0 10000 stages --cfg-stage1 1.5 2 3 4 6 --steps 40

train K2-fitv2-seed1 10000 --model FiTv2-Ti --class-groups 2 --seed 1
report groups2-fit1-10000-wide K2-fitv2-seed1 10000 stages --cfg-stage1 1.25 1.5 --steps 40
report groups2-fit1-10000 K2-fitv2-seed1 10000 stages --cfg-stage1 2 3 4 5 6 --steps 40
report groups2-fit1-2500 K2-fitv2-seed1 2500 stages --cfg-stage1 2 3 4 5 6 --steps 40

train K2-fitv2-seed2 2500 --model FiTv2-Ti --class-groups 2 --seed 2
report groups2-fit2-2500 K2-fitv2-seed2 2500 stages --cfg-stage1 2 3 4 5 6 --steps 40

train K2-means-seed0 2500 --class-groups 2 --seed 0 --lem-lr-factor 1 --prior-from means
report groups2-means0-2500 K2-means-seed0 2500 stages --stages 2 --cfg 1 2 3 4 5 6 8 --cfg-stage1 

train K2-means-seed1 2500 --class-groups 2 --seed 1 --lem-lr-factor 1 --prior-from means
report groups2-means1-2500 K2-means-seed1 2500 stages --stages 2 --cfg 1 2 3 4 5 6 8 --cfg-stage1 

train K2-means-seed2 2500 --class-groups 2 --seed 2 --lem-lr-factor 1 --prior-from means
report groups2-means2-2500 K2-means-seed2 2500 stages --stages 2 --cfg 1 2 3 4 5 6 8 --cfg-stage1 

train K2-n1-seed0 2500 --class-groups 2 --seed 0 --lem-lr-factor 1 --latent-tokens 1
report groups2-n1-0-2500 K2-n1-seed0 2500 stages --stages 2 --cfg 1 2 3 4 5 6 --cfg-stage1 

train K2-n1-seed1 2500 --class-groups 2 --seed 1 --lem-lr-factor 1 --latent-tokens 1
report groups2-n1-1-2500 K2-n1-seed1 2500 stages --stages 2 --cfg 1 2 3 4 5 6 --cfg-stage1 

train K2-n1-seed2 2500 --class-groups 2 --seed 2 --lem-lr-factor 1 --latent-tokens 1
report groups2-n1-2-2500 K2-n1-seed2 2500 stages --stages 2 --cfg 1 2 3 4 5 6 --cfg-stage1 

train K2-patches-seed0 2500 --class-groups 2 --seed 0 --lem-lr-factor 1 --prior-from patches
report groups2-patches0-2500 K2-patches-seed0 2500 stages --stages 2 --cfg 1 1.5 2 3 --cfg-stage1 

train K2-patches-seed1 2500 --class-groups 2 --seed 1 --lem-lr-factor 1 --prior-from patches
report groups2-patches1-2500 K2-patches-seed1 2500 stages --stages 2 --cfg 1 1.5 2 3 --cfg-stage1 

train K2-patches-seed2 2500 --class-groups 2 --seed 2 --lem-lr-factor 1 --prior-from patches
report groups2-patches2-2500 K2-patches-seed2 2500 stages --stages 2 --cfg 1 1.5 2 3 --cfg-stage1 

train K2-same-seed0 10000 --class-groups 2 --seed 0 --lem-lr-factor 1
report groups2-lem0-10000-wide K2-same-seed0 10000 stages --stages 1 --cfg 1 1.5 2 3.5 5.5 --cfg-stage1 1.25 1.5
report groups2-lem0-10000 K2-same-seed0 10000 stages --stages 2 --cfg 1 2 3 4 5 6 --cfg-stage1 2 3 4 5
report groups2-lem0-2500-wide K2-same-seed0 2500 stages --stages 1 --cfg 1 1.5 2 3.5 5.5 --cfg-stage1 6 8
report groups2-lem0-2500 K2-same-seed0 2500 stages --stages 2 --cfg 1 2 3 4 5 6 --cfg-stage1 2 3 4 5

train K2-same-seed1 10000 --class-groups 2 --seed 1 --lem-lr-factor 1
report groups2-lem1-10000-wide K2-same-seed1 10000 stages --stages 1 --cfg 1 1.5 2 3.5 5.5 --cfg-stage1 1.25 1.5
report groups2-lem1-10000 K2-same-seed1 10000 stages --stages 2 --cfg 1 2 3 4 5 6 --cfg-stage1 2 3 4 5
report groups2-lem1-2500-wide K2-same-seed1 2500 stages --stages 1 --cfg 1 1.5 2 3.5 5.5 --cfg-stage1 6 8
report groups2-lem1-2500 K2-same-seed1 2500 stages --stages 2 --cfg 1 2 3 4 5 6 --cfg-stage1 2 3 4 5

train K2-same-seed2 2500 --class-groups 2 --seed 2 --lem-lr-factor 1
report groups2-lem2-2500-wide K2-same-seed2 2500 stages --stages 1 --cfg 1 1.5 2 3.5 5.5 --cfg-stage1 6 8
report groups2-lem2-2500 K2-same-seed2 2500 stages --stages 2 --cfg 1 2 3 4 5 6 --cfg-stage1 2 3 4 5

train K5-fitv2-seed0 10000 --model FiTv2-Ti --class-groups 5 --seed 0
report groups5-fit0-10000 K5-fitv2-seed0 10000 stages --cfg-stage1 1.25 1.5 2 2.5 3 --steps 40
report groups5-fit0-2500 K5-fitv2-seed0 2500 stages --cfg-stage1 1.5 2 2.5 3 4 --steps 40

train K5-fitv2-seed1 10000 --model FiTv2-Ti --class-groups 5 --seed 1
report groups5-fit1-10000 K5-fitv2-seed1 10000 stages --cfg-stage1 1.25 1.5 2 2.5 3 --steps 40
report groups5-fit1-2500 K5-fitv2-seed1 2500 stages --cfg-stage1 1.5 2 2.5 3 4 --steps 40

train K5-fitv2-seed2 2500 --model FiTv2-Ti --class-groups 5 --seed 2
report groups5-fit2-2500 K5-fitv2-seed2 2500 stages --cfg-stage1 1.5 2 2.5 3 4 --steps 40

train K5-same-seed0 10000 --class-groups 5 --seed 0 --lem-lr-factor 1
report groups5-lem0-10000 K5-same-seed0 10000 stages --stages 2 --cfg 1 1.5 2 2.5 3 4 --cfg-stage1 1.25 1.5 2 2.5 3
report groups5-lem0-2500 K5-same-seed0 2500 stages --stages 2 --cfg 1 1.5 2 2.5 3 4 --cfg-stage1 1.5 2 2.5 3 4

train K5-same-seed1 10000 --class-groups 5 --seed 1 --lem-lr-factor 1
report groups5-lem1-10000 K5-same-seed1 10000 stages --stages 2 --cfg 1 1.5 2 2.5 3 4 --cfg-stage1 1.25 1.5 2 2.5 3
report groups5-lem1-2500 K5-same-seed1 2500 stages --stages 2 --cfg 1 1.5 2 2.5 3 4 --cfg-stage1 1.5 2 2.5 3 4

train K5-same-seed2 2500 --class-groups 5 --seed 2 --lem-lr-factor 1
report groups5-lem2-2500 K5-same-seed2 2500 stages --stages 2 --cfg 1 1.5 2 2.5 3 4 --cfg-stage1 1.5 2 2.5 3 4

train K10-fitv2-lr0.001-seed0 2500 --model FiTv2-Ti --class-groups 10 --seed 0 --lr 0.001
report groups10-fitv2-lr0.001-0-2500 K10-fitv2-lr0.001-seed0 2500 stages --cfg-stage1 1.5 2 3 4 6 --steps 40

train K10-fitv2-lr0.0014-seed0 2500 --model FiTv2-Ti --class-groups 10 --seed 0 --lr 0.0014
report groups10-fitv2-lr0.0014-0-2500 K10-fitv2-lr0.0014-seed0 2500 stages --cfg-stage1 1.5 2 3 4 6 --steps 40

train K10-fitv2-seed0 20000 --model FiTv2-Ti --class-groups 10 --seed 0
report groups10-fit0-10000 K10-fitv2-seed0 10000 stages --cfg-stage1 1.25 1.5 2 2.5 --steps 40
report groups10-fit0-20000 K10-fitv2-seed0 20000 stages --cfg-stage1 1.25 1.5 2 --steps 40
report groups10-fit0-2500 K10-fitv2-seed0 2500 stages --cfg-stage1 1.5 2 2.5 3 --steps 40
report groups10-fit0-5000 K10-fitv2-seed0 5000 stages --cfg-stage1 1.25 1.5 2 --steps 40
report groups10-fitv2-0-10000 K10-fitv2-seed0 10000 stages --cfg-stage1 1.5 2 3 4 6 --steps 40
report groups10-fitv2-0-2500 K10-fitv2-seed0 2500 stages --cfg-stage1 1.5 2 3 4 6 --steps 40
report steps20-fit0-2500 K10-fitv2-seed0 2500 stages --cfg-stage1 
report steps27-fit0-2500 K10-fitv2-seed0 2500 stages --cfg-stage1 1.5 2 2.5 --steps 27
report steps60-fit0-2500 K10-fitv2-seed0 2500 stages --cfg-stage1  --steps 60

train K10-fitv2-seed1 10000 --model FiTv2-Ti --class-groups 10 --seed 1
report groups10-fit1-10000 K10-fitv2-seed1 10000 stages --cfg-stage1 1.25 1.5 2 --steps 40
report groups10-fit1-2500 K10-fitv2-seed1 2500 stages --cfg-stage1 1.5 2 2.5 3 --steps 40
report steps20-fit1-2500 K10-fitv2-seed1 2500 stages --cfg-stage1 
report steps27-fit1-2500 K10-fitv2-seed1 2500 stages --cfg-stage1 1.5 2 2.5 --steps 27
report steps60-fit1-2500 K10-fitv2-seed1 2500 stages --cfg-stage1  --steps 60

train K10-fitv2-seed2 10000 --model FiTv2-Ti --class-groups 10 --seed 2
report groups10-fit2-10000 K10-fitv2-seed2 10000 stages --cfg-stage1 1.25 1.5 2 --steps 40
report groups10-fit2-2500 K10-fitv2-seed2 2500 stages --cfg-stage1 1.5 2 2.5 3 --steps 40
report steps20-fit2-2500 K10-fitv2-seed2 2500 stages --cfg-stage1 
report steps27-fit2-2500 K10-fitv2-seed2 2500 stages --cfg-stage1 1.5 2 2.5 --steps 27
report steps60-fit2-2500 K10-fitv2-seed2 2500 stages --cfg-stage1  --steps 60

train K10-means-seed0 2500 --class-groups 10 --seed 0 --lem-lr-factor 1 --prior-from means
report groups10-means0-2500 K10-means-seed0 2500 stages --stages 2 --cfg 1 2 3 4 5 6 --cfg-stage1 2 2.5 3

train K10-means-seed1 2500 --class-groups 10 --seed 1 --lem-lr-factor 1 --prior-from means
report groups10-means1-2500 K10-means-seed1 2500 stages --stages 2 --cfg 1 2 3 4 5 6 --cfg-stage1 2 2.5 3

train K10-means-seed2 2500 --class-groups 10 --seed 2 --lem-lr-factor 1 --prior-from means
report groups10-means2-2500 K10-means-seed2 2500 stages --stages 2 --cfg 1 2 3 4 5 6 --cfg-stage1 2 2.5 3

train K10-n1-seed0 10000 --class-groups 10 --seed 0 --lem-lr-factor 1 --latent-tokens 1
report groups10-n1-0-10000 K10-n1-seed0 10000 stages --stages 2 --cfg 1.25 1.5 2 2.5 --cfg-stage1 1.25 1.5 2
report groups10-n1-0-2500 K10-n1-seed0 2500 stages --stages 2 --cfg 1 1.5 2 2.5 3 4 --cfg-stage1 2 2.5 3
report probe-n1-0-10000 K10-n1-seed0 10000 probe
report reconstruct-n1-0-10000 K10-n1-seed0 10000 reconstruct --cfg 1 1.5 2

train K10-n1-seed1 10000 --class-groups 10 --seed 1 --lem-lr-factor 1 --latent-tokens 1
report groups10-n1-1-10000 K10-n1-seed1 10000 stages --stages 2 --cfg 1.25 1.5 2 --cfg-stage1 1.25 1.5 2
report groups10-n1-1-2500 K10-n1-seed1 2500 stages --stages 2 --cfg 1 1.5 2 2.5 3 4 --cfg-stage1 2 2.5 3
report probe-n1-1-10000 K10-n1-seed1 10000 probe
report reconstruct-n1-1-10000 K10-n1-seed1 10000 reconstruct --cfg 1 1.5 2

train K10-n1-seed2 2500 --class-groups 10 --seed 2 --lem-lr-factor 1 --latent-tokens 1
report groups10-n1-2-2500 K10-n1-seed2 2500 stages --stages 2 --cfg 1 1.5 2 2.5 3 4 --cfg-stage1 2 2.5 3

train K10-n16-seed0 10000 --class-groups 10 --seed 0 --lem-lr-factor 1 --latent-tokens 16
report groups10-n16-0-10000-wide K10-n16-seed0 10000 stages --stages 2 --cfg 4 --cfg-stage1 
report groups10-n16-0-10000 K10-n16-seed0 10000 stages --stages 2 --cfg 1.5 2 2.5 3 --cfg-stage1 1.25 1.5 2
report groups10-n16-0-2500 K10-n16-seed0 2500 stages --stages 2 --cfg 1 1.5 2 2.5 3 4 6 --cfg-stage1 2 2.5 3
report probe-n16-0-10000 K10-n16-seed0 10000 probe
report reconstruct-n16-0-10000 K10-n16-seed0 10000 reconstruct --cfg 1 1.5 2

train K10-n16-seed1 10000 --class-groups 10 --seed 1 --lem-lr-factor 1 --latent-tokens 16
report groups10-n16-1-10000 K10-n16-seed1 10000 stages --stages 2 --cfg 2 3 4 --cfg-stage1 1.25 1.5 2
report groups10-n16-1-2500 K10-n16-seed1 2500 stages --stages 2 --cfg 1 1.5 2 2.5 3 4 6 --cfg-stage1 2 2.5 3
report probe-n16-1-10000 K10-n16-seed1 10000 probe
report reconstruct-n16-1-10000 K10-n16-seed1 10000 reconstruct --cfg 1 1.5 2

train K10-n4-seed0 10000 --class-groups 10 --seed 0 --lem-lr-factor 1 --latent-tokens 4
report groups10-n4-0-10000-wide K10-n4-seed0 10000 stages --stages 2 --cfg 1.25 --cfg-stage1 
report groups10-n4-0-10000 K10-n4-seed0 10000 stages --stages 2 --cfg 1.5 2 2.5 3 --cfg-stage1 1.25 1.5 2
report groups10-n4-0-2500 K10-n4-seed0 2500 stages --stages 2 --cfg 1 1.5 2 2.5 3 4 6 --cfg-stage1 2 2.5 3
report probe-n4-0-10000 K10-n4-seed0 10000 probe
report reconstruct-n4-0-10000 K10-n4-seed0 10000 reconstruct --cfg 1 1.5 2

train K10-n4-seed1 10000 --class-groups 10 --seed 1 --lem-lr-factor 1 --latent-tokens 4
report groups10-n4-1-10000 K10-n4-seed1 10000 stages --stages 2 --cfg 1.25 1.5 2 --cfg-stage1 1.25 1.5 2
report groups10-n4-1-2500 K10-n4-seed1 2500 stages --stages 2 --cfg 1 1.5 2 2.5 3 4 6 --cfg-stage1 2 2.5 3
report probe-n4-1-10000 K10-n4-seed1 10000 probe
report reconstruct-n4-1-10000 K10-n4-seed1 10000 reconstruct --cfg 1 1.5 2

train K10-p25-seed0 10000 --class-groups 10 --seed 0 --lem-lr-factor 1 --p-s 0.25
report groups10-p25-0-10000-wide K10-p25-seed0 10000 stages --stages 2 --cfg 4 5.5 --cfg-stage1 2.5
report groups10-p25-0-10000 K10-p25-seed0 10000 stages --stages 2 --cfg 1.5 2 2.5 3 --cfg-stage1 1.25 1.5 2
report probe-p25-0-10000 K10-p25-seed0 10000 probe
report reconstruct-p25-0-10000 K10-p25-seed0 10000 reconstruct --cfg 1 1.5 2

train K10-p25-seed1 10000 --class-groups 10 --seed 1 --lem-lr-factor 1 --p-s 0.25
report groups10-p25-1-10000-wide K10-p25-seed1 10000 stages --stages 2 --cfg 7 10 14 --cfg-stage1 
report groups10-p25-1-10000 K10-p25-seed1 10000 stages --stages 2 --cfg 3 4 5.5 --cfg-stage1 1.5 2 2.5
report probe-p25-1-10000 K10-p25-seed1 10000 probe
report reconstruct-p25-1-10000 K10-p25-seed1 10000 reconstruct --cfg 1 1.5 2

train K10-p75-seed0 10000 --class-groups 10 --seed 0 --lem-lr-factor 1 --p-s 0.75
report groups10-p75-0-10000-wide K10-p75-seed0 10000 stages --stages 2 --cfg 1.25 --cfg-stage1 
report groups10-p75-0-10000 K10-p75-seed0 10000 stages --stages 2 --cfg 1.5 2 2.5 3 --cfg-stage1 1.25 1.5 2
report probe-p75-0-10000 K10-p75-seed0 10000 probe
report reconstruct-p75-0-10000 K10-p75-seed0 10000 reconstruct --cfg 1 1.5 2

train K10-p75-seed1 10000 --class-groups 10 --seed 1 --lem-lr-factor 1 --p-s 0.75
report groups10-p75-1-10000 K10-p75-seed1 10000 stages --stages 2 --cfg 1.25 1.5 2 --cfg-stage1 1.25 1.5 2
report probe-p75-1-10000 K10-p75-seed1 10000 probe
report reconstruct-p75-1-10000 K10-p75-seed1 10000 reconstruct --cfg 1 1.5 2

train K10-patches-seed0 10000 --class-groups 10 --seed 0 --lem-lr-factor 1 --prior-from patches
report groups10-patches0-10000 K10-patches-seed0 10000 stages --stages 2 --cfg 1.5 2 2.5 3 --cfg-stage1 1.25 1.5 2
report groups10-patches0-2500 K10-patches-seed0 2500 stages --stages 2 --cfg 1 1.5 2 3 --cfg-stage1 2 2.5 3
report probe-patches0-10000 K10-patches-seed0 10000 probe
report reconstruct-patches0-10000 K10-patches-seed0 10000 reconstruct --cfg 1 1.5 2

train K10-patches-seed1 10000 --class-groups 10 --seed 1 --lem-lr-factor 1 --prior-from patches
report groups10-patches1-10000 K10-patches-seed1 10000 stages --stages 2 --cfg 1.5 3 --cfg-stage1 1.25 1.5 2
report groups10-patches1-2500 K10-patches-seed1 2500 stages --stages 2 --cfg 1 1.5 2 3 --cfg-stage1 2 2.5 3
report probe-patches1-10000 K10-patches-seed1 10000 probe
report reconstruct-patches1-10000 K10-patches-seed1 10000 reconstruct --cfg 1 1.5 2

train K10-patches-seed2 2500 --class-groups 10 --seed 2 --lem-lr-factor 1 --prior-from patches
report groups10-patches2-2500 K10-patches-seed2 2500 stages --stages 2 --cfg 1 1.5 2 3 --cfg-stage1 2 2.5 3

train K10-same-seed0 20000 --class-groups 10 --seed 0 --lem-lr-factor 1
report groups10-lem0-10000 K10-same-seed0 10000 stages --stages 2 --cfg 1.5 2 2.5 3 --cfg-stage1 1.25 1.5 2
report groups10-lem0-20000 K10-same-seed0 20000 stages --stages 2 --cfg 1.5 2 2.5 3 --cfg-stage1 1.25 1.5 2
report groups10-lem0-2500-wide K10-same-seed0 2500 stages --stages 2 --cfg 4 6 --cfg-stage1 6
report groups10-lem0-2500 K10-same-seed0 2500 stages --stages 2 --cfg 1 1.5 2 2.5 3 --cfg-stage1 1.5 2 2.5 3 4
report groups10-lem0-5000 K10-same-seed0 5000 stages --stages 2 --cfg 1.5 2 2.5 3 --cfg-stage1 1.5 2 2.5
report groups10-same0-2500 K10-same-seed0 2500 stages --stages 2 --cfg 1 1.5 2 3 4 6 --cfg-stage1 1.5 2 3 4 6
# at 64e919d: report interval-0-0.5-lem0-2500-wide K10-same-seed0 2500 stages --stages 2 --cfg 6 8 --cfg-stage1  --interval 0,0.5
# at 64e919d: report interval-0-0.5-lem0-2500 K10-same-seed0 2500 stages --stages 2 --cfg 1.5 2 3 4 --cfg-stage1  --interval 0,0.5
# at 64e919d: report interval-0.5-1-lem0-2500 K10-same-seed0 2500 stages --stages 2 --cfg 1.5 2 3 4 --cfg-stage1  --interval 0.5,1
# at 64e919d: report prior-lem0-2500-wide K10-same-seed0 2500 stages --stages 2 --cfg 8 11 --cfg-stage1  --guide-on prior
# at 64e919d: report prior-lem0-2500 K10-same-seed0 2500 stages --stages 2 --cfg 1.5 2 3 4 6 --cfg-stage1  --guide-on prior
report probe-lem0-10000 K10-same-seed0 10000 probe
report reconstruct-lem0-10000 K10-same-seed0 10000 reconstruct --cfg 1 1.5 2
report reconstruct-lem0-20000 K10-same-seed0 20000 reconstruct --cfg 1 1.5 2
report reconstruct-lem0-2500 K10-same-seed0 2500 reconstruct --cfg 1 1.5 2 3.5 5.5
report reconstruct-lem0-5000 K10-same-seed0 5000 reconstruct --cfg 1 1.5 2
report stages3-lem0-2500 K10-same-seed0 2500 stages --cfg 1 1.5 2 2.5 3.5 5.5 --cfg-stage1 1.5 2 2.5 3 4 6
report steps40-lem0-2500 K10-same-seed0 2500 stages --stages 2 --cfg 1 --cfg-stage1  --steps 40
report steps60-lem0-2500 K10-same-seed0 2500 stages --stages 2 --cfg 1 --cfg-stage1  --steps 60

train K10-same-seed1 10000 --class-groups 10 --seed 1 --lem-lr-factor 1
report groups10-lem1-10000-wide K10-same-seed1 10000 stages --stages 2 --cfg 1.25 --cfg-stage1 
report groups10-lem1-10000 K10-same-seed1 10000 stages --stages 2 --cfg 1.5 2 2.5 3 --cfg-stage1 1.25 1.5 2
report groups10-lem1-2500-wide K10-same-seed1 2500 stages --stages 2 --cfg 4 6 --cfg-stage1 6
report groups10-lem1-2500 K10-same-seed1 2500 stages --stages 2 --cfg 1 1.5 2 2.5 3 --cfg-stage1 1.5 2 2.5 3 4
report groups10-same1-2500 K10-same-seed1 2500 stages --stages 2 --cfg 1 2 3 4 --cfg-stage1 2 3 4
# at 64e919d: report interval-0-0.5-lem1-2500-wide K10-same-seed1 2500 stages --stages 2 --cfg 6 8 --cfg-stage1  --interval 0,0.5
# at 64e919d: report interval-0-0.5-lem1-2500 K10-same-seed1 2500 stages --stages 2 --cfg 1.5 2 3 4 --cfg-stage1  --interval 0,0.5
# at 64e919d: report interval-0.5-1-lem1-2500 K10-same-seed1 2500 stages --stages 2 --cfg 1.5 2 3 4 --cfg-stage1  --interval 0.5,1
# at 64e919d: report prior-lem1-2500-wide K10-same-seed1 2500 stages --stages 2 --cfg 8 11 --cfg-stage1  --guide-on prior
# at 64e919d: report prior-lem1-2500 K10-same-seed1 2500 stages --stages 2 --cfg 1.5 2 3 4 6 --cfg-stage1  --guide-on prior
report probe-lem1-10000 K10-same-seed1 10000 probe
report reconstruct-lem1-10000 K10-same-seed1 10000 reconstruct --cfg 1 1.5 2
report stages3-lem1-2500 K10-same-seed1 2500 stages --cfg 1.5 2 2.5 --cfg-stage1 1.5 2 2.5 3 4
report steps40-lem1-2500 K10-same-seed1 2500 stages --stages 2 --cfg 1 --cfg-stage1  --steps 40
report steps60-lem1-2500 K10-same-seed1 2500 stages --stages 2 --cfg 1 --cfg-stage1  --steps 60

train K10-same-seed2 10000 --class-groups 10 --seed 2 --lem-lr-factor 1
report groups10-lem2-10000-wide K10-same-seed2 10000 stages --stages 2 --cfg 1.25 --cfg-stage1 
report groups10-lem2-10000 K10-same-seed2 10000 stages --stages 2 --cfg 1.5 2 2.5 --cfg-stage1 1.25 1.5 2
report groups10-lem2-2500-wide K10-same-seed2 2500 stages --stages 2 --cfg 4 6 --cfg-stage1 6
report groups10-lem2-2500 K10-same-seed2 2500 stages --stages 2 --cfg 1 1.5 2 2.5 3 --cfg-stage1 1.5 2 2.5 3 4
report groups10-same2-2500 K10-same-seed2 2500 stages --stages 2 --cfg 1 2 3 4 --cfg-stage1 2 3 4
# at 64e919d: report interval-0-0.5-lem2-2500-wide K10-same-seed2 2500 stages --stages 2 --cfg 6 8 --cfg-stage1  --interval 0,0.5
# at 64e919d: report interval-0-0.5-lem2-2500 K10-same-seed2 2500 stages --stages 2 --cfg 1.5 2 3 4 --cfg-stage1  --interval 0,0.5
# at 64e919d: report interval-0.5-1-lem2-2500 K10-same-seed2 2500 stages --stages 2 --cfg 1.5 2 3 4 --cfg-stage1  --interval 0.5,1
# at 64e919d: report prior-lem2-2500-wide K10-same-seed2 2500 stages --stages 2 --cfg 8 11 --cfg-stage1  --guide-on prior
# at 64e919d: report prior-lem2-2500 K10-same-seed2 2500 stages --stages 2 --cfg 1.5 2 3 4 6 --cfg-stage1  --guide-on prior
report stages3-lem2-2500 K10-same-seed2 2500 stages --cfg 1.5 2 2.5 --cfg-stage1 1.5 2 2.5 3 4
report steps40-lem2-2500 K10-same-seed2 2500 stages --stages 2 --cfg 1 --cfg-stage1  --steps 40
report steps60-lem2-2500 K10-same-seed2 2500 stages --stages 2 --cfg 1 --cfg-stage1  --steps 60

train cifar-K10-fitv2-seed0 10000 --model FiTv2-Ti --class-groups 10 --seed 0 --data cifar10/train --image-size 16 --patch-size 4
report cifar-groups10-fitv2-0-10000 cifar-K10-fitv2-seed0 10000 stages --cfg-stage1 1.5 2 3 4 6 --steps 40
report cifar-groups10-fitv2-0-2500 cifar-K10-fitv2-seed0 2500 stages --cfg-stage1 1.5 2 3 4 6 --steps 40

# Of these only the logs are used.
train cifar-K1-beta95-seed0 2500 --class-groups 1 --seed 0 --beta2 0.95 --lem-lr-factor 0.25 --data cifar10/train --image-size 16 --patch-size 4
train K1-eighth-seed1 2500 --class-groups 1 --seed 1 --lem-lr-factor 0.125
train K1-same-lr0.001-seed1 2500 --class-groups 1 --seed 1 --lem-lr-factor 1 --lr 0.001
