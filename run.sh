#!/usr/bin/env bash
# Set up and launch.
#   ./run.sh [--field=value ...]     train on all GPUs there are; fetches the data that is missing
#   ./run.sh check [...]             only say what it would do, and whether that is sound
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
    train|check|test) ;;
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
# OpenMP threads that wait spin a little, but not long enough to steal the cores of others; memory
# that is freed stays with the process, instead of being zeroed for it again (glibc)
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1073741824}"
# seconds that torchrun leaves its processes to save their state when it is told to stop, not 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"

case "$command" in
    train) ;;
    check) exec $python train_gpt.py check "$@" ;;
    test)
        install tests/requirements.txt
        exec $python -m pytest -q -n auto --dist=loadfile "$@" tests ;;
    *)
        [ "$command" != plot ] || install tools/requirements.txt
        exec $python "tools/$command.py" "$@" ;;
esac

# ---- train: the script says on how many processes, after a look at settings and data
case " $* " in *" --help "*|*" -h "*) exec $python train_gpt.py --help ;; esac
gpus=0
if nvidia-smi -L 2>/dev/null | grep '^GPU' > /dev/null; then
    gpus=$($python -c 'import torch; print(int(torch.cuda.is_available()))')
    [ "$gpus" -gt 0 ] || [ -n "${CUDA_VISIBLE_DEVICES+set}" ] ||
        echo "warning: PyTorch cannot use the GPUs that nvidia-smi lists (driver too old?)" >&2
    [ "$gpus" -gt 0 ] || export CUDA_VISIBLE_DEVICES=""
fi
# without a GPU the track is cpu, whose data is here: nothing has to be asked
case "$gpus $* " in 0*--track=*|0*--dataset=*|1*) ;; *) exec $python train_gpt.py "$@" ;; esac
if ! plan=$($python train_gpt.py check "$@" 2>&1); then
    case "$plan" in
        *"python data/fineweb.py"*|*data/fineweb:*"get more"*) ;;
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
[ "$processes" -gt 1 ] || exec $python train_gpt.py "$@"
exec $python -m torch.distributed.run --standalone --nproc_per_node="$processes" \
    train_gpt.py "$@"
