#!/usr/bin/env bash
# Set up and launch.
#   ./run.sh [--field=value ...]     train on all GPUs there are; fetches the data that is missing
#   ./run.sh --track=auto --dataset=DIR [--minutes=60]    with settings that fit a text and a time
#   ./run.sh check [...]             only say what it would do, and whether that is sound
#   ./run.sh text PATH... --out=DIR  one's own text as a dataset
#   ./run.sh TOOL [...]              a script of tools/; ./run.sh TOOL --help says more
#   ./run.sh test [--slow] [...]     the tests: the quick ones, or with --slow the others
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { echo "error: $1" >&2; exit 2; }

for python in python3 python3.13 python3.12 python3.11 ""; do
    [ -n "$python" ] || fail "no Python 3.11 or newer found; install one"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
done
case "${1:-}" in --help|-h)
    sed -n '2,/^set/s/^# \{0,1\}//p' run.sh
    echo "TOOL is one of: $(cd tools && ls ./[a-z]*.py | sed 's|./||; s|\.py||' | xargs)"
    echo
    exec "$python" train_gpt.py --help
esac

command=train
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then command=$1; shift; fi
case "$command" in
    train|check|test|text) ;;
    _*|"") fail "no tool '$command'; ./run.sh --help lists them" ;;
    *) [ -f "tools/$command.py" ] || fail "no tools/$command.py; ./run.sh --help lists them" ;;
esac

# ---- environment: .venv, made anew when requirements.txt is not the one that it was made from
install() {
    cmp -s "$1" ".venv/${1//\//-}" && return
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" ||
        fail "pip could not install $1 (its message is above)"
    cp "$1" ".venv/${1//\//-}"
}
if ! cmp -s requirements.txt .venv/requirements.txt; then
    echo "setting up .venv (a few minutes the first time)"
    rm -rf .venv
    "$python" -m venv .venv || fail "python -m venv failed; on Debian: apt install python3-venv"
fi
install requirements.txt
python=.venv/bin/python
# OpenMP threads that wait spin a little, but not long enough to steal the cores of others: as
# train_gpt.py has it, for the tools too
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-5000}"
# seconds that torchrun leaves its processes to save their state when it is told to stop, not 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"

# ---- GPUs: those that PyTorch can use; who has others must say that the CPU is meant
count_gpus() {
    gpus=0
    nvidia-smi -L 2>/dev/null | grep '^GPU' > /dev/null || return 0
    gpus=$($python -c 'import torch
print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
    [ "$gpus" = 0 ] || return 0
    if [ -z "${CUDA_VISIBLE_DEVICES+set}" ] && [[ " $* " != *" --device=cpu "* ]]; then
        driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | sed -n 1p)
        cuda=$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p')
        built=$($python -c 'import torch; print(torch.version.cuda)')
        fail "PyTorch cannot use the GPUs that nvidia-smi lists: driver $driver is for CUDA ${cuda:-?},\
 this PyTorch for CUDA $built; install a newer driver or another PyTorch (see README), or go on\
 without GPUs: --device=cpu"
    fi
    export CUDA_VISIBLE_DEVICES=""
}

launch() {      # on $1 processes: a script and its arguments
    processes=$1
    shift
    [ "$processes" -gt 1 ] || exec $python "$@"
    exec $python -m torch.distributed.run --standalone --nproc_per_node="$processes" "$@"
}

case "$command" in
    train) ;;
    check) exec $python train_gpt.py check "$@" ;;
    text)
        install data/requirements-text.txt
        exec $python data/text.py "$@" ;;
    test)
        for file in {tests,tools}/requirements.txt data/requirements-text.txt \
                tools/requirements-export.txt; do
            install "$file"
        done
        exec $python -m pytest -q -n auto --dist=loadfile "$@" tests ;;
    bench)      # on as many processes as a run: the largest power of two of the GPUs
        count_gpus "$@"
        processes=1
        [[ " $* " == *" --device=cpu "* ]] ||
            while [ $((2 * processes)) -le "$gpus" ]; do processes=$((2 * processes)); done
        launch "$processes" tools/bench.py "$@" ;;
    *)
        case "$command" in
            plot|compare|sweep|record) install tools/requirements.txt ;;
            export) install tools/requirements-export.txt ;;
        esac
        exec $python "tools/$command.py" "$@" ;;
esac

# ---- train: the script says on how many processes, after a look at settings and data
case " $* " in
    *" --track=auto "*) count_gpus "$@"; exec $python tools/auto.py "$@" ;;
    *" --help "*|*" -h "*) exec $python train_gpt.py --help ;;
esac
count_gpus "$@"
case "$gpus $* " in
    0*" --device="*|0*" --preset=toy "*) ;;
    0*" --track=mini "*|0*" --track=tiny "*|0*" --track=limited "*|0*" --track=two_hour "*|\
    0*" --track=unlimited "*)
        $python tools/plan.py "$@" || exit $?
        fail "a track for GPUs, and PyTorch finds none here (the plan is above); take --track=cpu or\
 --preset=toy, or insist with --device=cpu" ;;
esac
# without a GPU the track is cpu, whose data is here: nothing has to be asked
case "$gpus $* " in 0*--track=*|0*--dataset=*|[1-9]*) ;; *) exec $python train_gpt.py "$@" ;; esac
if ! plan=$($python train_gpt.py check "$@" 2>&1); then
    case "$plan" in
        *data/fineweb:*"; get "*) ;;        # them, more, or a shard that is missing
        *) echo "$plan" >&2; exit 2 ;;
    esac
    fetch=(data/fineweb.py)
    # mini needs 4M: then as many as a baseline of 12 times that
    [[ "$plan" != *"track mini,"* ]] || fetch+=(--tokens=48_000_000)
    $python "${fetch[@]}" || exit $?
    plan=$($python train_gpt.py check "$@") || exit $?
fi
echo "$plan"
processes=$(sed -n 's/^track .*, processes //p' <<< "$plan")
launch "$processes" train_gpt.py "$@"
