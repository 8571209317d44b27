#!/usr/bin/env bash
# Everything that wants a GPU, in one run of a few minutes: build, parity tests, benchmarks against their peers.
#
#   benchmarks/gpu_suite.sh OUT_DIR              on a machine with an NVIDIA GPU
#   benchmarks/gpu_suite.sh --rehearse OUT_DIR   the same steps on the CPU, cut down, so that the script cannot rot
#
# Writes OUT_DIR/{environment,benchmarks}.json and a log a step; the last lines printed are the table. A step that fails
# does not keep the next from running; the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.."

rehearse=
if [ "${1:-}" = --rehearse ]; then
    rehearse=yes
    shift
fi
out=${1:?usage: benchmarks/gpu_suite.sh [--rehearse] OUT_DIR}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=

step() { # name, command...
    local name=$1 began=$SECONDS
    shift
    if "$@" >"$out/$name.log" 2>&1; then
        echo "$name: ok, $((SECONDS - began)) s"
    else
        echo "$name: FAILED, $((SECONDS - began)) s; the end of $out/$name.log:"
        tail -n 15 "$out/$name.log"
        failed=yes
    fi
}

parity() { # a process for each test that wants a GPU: most of the time goes into compiling Triton kernels
    "$python" -m pytest tests --collect-only -q -m gpu -p no:cacheprovider |
        sed -n 's/\[.*//; /::/p' | sort -u >"$out/parity.txt"
    [ -s "$out/parity.txt" ] || { echo "no test wants a GPU here"; return 1; }
    # shellcheck disable=SC2016
    xargs -P "$(($(nproc) / 2))" -I{} bash -c \
        'said=$("$0" -m pytest "{}" -q -m gpu -p no:cacheprovider 2>&1); status=$?; echo "$said"; exit $status' \
        "$python" <"$out/parity.txt"
}

step build "$python" setup.py build_ext --inplace
step environment "$python" - "$out/environment.json" <<'PYTHON'
import json, platform, sys, time
import torch, torchvision, triton
import kernels

try:
    from nvidia.dali import __version__ as dali
except ImportError:
    dali = None
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
facts = {
    "gpu": gpu.name if gpu else None,
    "compute_capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
    "date": time.strftime("%Y-%m-%d"),
    "python": platform.python_version(),
    "torch": torch.__version__,
    "torchvision": torchvision.__version__,
    "triton": triton.__version__,
    "dali": dali,
    "backends": kernels.available_backends(),
}
with open(sys.argv[1], "w") as file:
    json.dump(facts, file, indent=2)
print(facts)
PYTHON
if [ -n "$rehearse" ]; then
    step sanitizer "$python" -m pytest tests/test_cuda_on_cpu.py -q -k "clean_under_address" -p no:cacheprovider
    step parity "$python" -m pytest tests/test_squeeze_excite.py tests/test_residual_tail.py -q -p no:cacheprovider \
        -k "triton and odd and (squeeze or channels_last)"
    selection=(-k "(stage and 4 and float32) or train_step or test_data")
    export REHEARSAL=yes # for the training step and the data
else
    step parity parity
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck synccheck; do
            step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q -p no:cacheprovider \
                tests/test_squeeze_excite.py -m gpu -k "cuda and values and odd and float32"
        done
        step memcheck_tail compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m pytest -q \
            -p no:cacheprovider tests/test_residual_tail.py -m gpu -k "triton and shapes and odd and norm_se_add_norm_relu"
    else
        echo "compute-sanitizer: not installed, left out"
    fi
    selection=()
fi
# a run as a user has it and what follows it, by the one input pipeline that DALI need not be installed for
short=()
[ -z "$rehearse" ] || short=(--model seresnet18 --epochs 2 --warmup-epochs 1)
step training "$python" -m engine.train --fused-se --data-backend resident --output "$out/run" "${short[@]}"
step report "$python" -m engine.report "$out/run"
step export "$python" -m engine.export "$out/run" --format torch-export --output "$out/model.pt2"
step benchmarks "$python" -m pytest benchmarks/ --benchmark-only -q -p no:cacheprovider \
    --benchmark-json "$out/benchmarks.json" "${selection[@]}"
sed -n '/^=* times and ratios/,/^geometric mean/p' "$out/benchmarks.log"
[ -z "$failed" ]
