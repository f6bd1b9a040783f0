#!/usr/bin/env bash
# Set up and launch.   ./run.sh [--field=value ...]   ·   ./run.sh COMMAND ...   ·   ./run.sh test
# COMMAND is one of train_gpt.py's (baseline, sample, check, bench); --help lists the fields.
# bench is one process here; N of them: .venv/bin/torchrun --nproc_per_node=N train_gpt.py bench ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { echo "error: $1" >&2; exit 2; }

# ---- environment: .venv, made anew when requirements.txt is not the one it was made from
for python in python3 python3.13 python3.12 python3.11 ""; do
    [ -n "$python" ] || fail "no Python 3.11 or newer found; install one"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
done
if ! cmp -s requirements.txt .venv/requirements.installed; then
    echo "setting up .venv (a few minutes the first time)"
    rm -rf .venv
    "$python" -m venv .venv || fail "python -m venv failed; on Debian: apt install python3-venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
        fail "pip could not install requirements.txt (its message is above)"
    cp requirements.txt .venv/requirements.installed
fi
python=.venv/bin/python
# OpenMP threads that wait spin a little, but not long enough to steal the cores of others; memory
# that is freed stays with the process, instead of being zeroed for it again (glibc)
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1073741824}"
# seconds that torchrun leaves its processes to save their state when it is told to stop, not 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"

if [ "${1:-}" = test ]; then
    shift
    exec $python -m pytest -q "$@" tests
fi

# ---- what to run: command, track, processes
command=train
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then command=$1; shift; fi
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then       # a list, of which nvidia-smi does not know
    IFS=, read -ra visible <<< "$CUDA_VISIBLE_DEVICES"
    [ "${#visible[@]}" -ge "$gpus" ] || gpus=${#visible[@]}
fi
track="" dataset=""
for argument in "$@"; do
    case "$argument" in
        --track=*) track=${argument#--track=} ;;
        --dataset=*) dataset=${argument#--dataset=} ;;
        --help|-h) exec $python train_gpt.py --help ;;
        --device=cpu) gpus=0 ;;
    esac
done
if [ "$gpus" -gt 0 ] && ! $python -c 'import torch; exit(not torch.cuda.is_available())'; then
    echo "warning: nvidia-smi lists $gpus GPU(s), but PyTorch cannot use them (driver too old?)" >&2
    gpus=0
fi
if [ -z "$track" ] && [ "$command" != sample ]; then
    track=cpu
    [ "$gpus" -lt 1 ] || track=mini
    [ "$gpus" -lt 2 ] || track=limited
    set -- "--track=$track" "$@"
fi

# ---- settings and data are checked before many processes are launched, or where data may have to
# be fetched: that of cpu is here
case "$command" in
    train|baseline) ;;
    *) exec $python train_gpt.py "$command" "$@" ;;
esac
processes=1     # the batch is shared out evenly over a power of two
while [ $((2 * processes)) -le "$gpus" ]; do processes=$((2 * processes)); done
[ "$processes" -ge "$gpus" ] || echo "using $processes of $gpus GPUs"
check() { RANK=0 WORLD_SIZE=$processes $python train_gpt.py check "$@"; }
if [ "$track$dataset$processes" != cpu1 ] && ! message=$(check "$@" 2>&1); then
    fetch=(data/fineweb.py)
    [ "$track" != mini ] || fetch+=(--tokens=48_000_000)  # room for a baseline of 12 times its 4M
    case "$message" in
        *"python data/fineweb.py"*|*data/fineweb:*"get more"*) $python "${fetch[@]}" || exit $? ;;
        *) echo "$message" >&2; exit 2 ;;
    esac
    check "$@" > /dev/null || exit $?
fi
[ "$processes" -gt 1 ] || exec $python train_gpt.py "$command" "$@"
exec $python -m torch.distributed.run --standalone --nproc_per_node="$processes" \
    train_gpt.py "$command" "$@"
