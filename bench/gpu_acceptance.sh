#!/usr/bin/env bash
# Everything that needs a GPU, in one command. See --help.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: bench/gpu_acceptance.sh OUT_DIR [--quick] [--budget SECONDS] [--only STAGE,...] [--fresh]

Runs environment, build, tests, sanitizer, micro, tune, decode, middle, large, training, profile and kernels on
the NVIDIA GPU of this machine, offline, and leaves eight small files in OUT_DIR:

  summary.txt  environment.json  micro.json  table.json  rows.jsonl  report.html  profile.html  log.txt

  --quick           fewer cases of everything, below 5 minutes
  --budget SECONDS  start no stage after this long (default 570, --quick 285); the next call goes on
  --only STAGES     these stages alone, comma-separated
  --fresh           forget what earlier calls finished

A stage that finished at this commit is not run again; each has a time limit of its own, and tuning and timing go on
where they were cut off. State lies in out/gpu-acceptance (MK_STATE). PYTHON=... names the interpreter.
Exit status: 0 all stages passed, 1 some failed, 2 wrong arguments or no GPU, 3 stages are left for another call.
EOF
}

out="" quick="" budget="" only="" fresh=""
while (($#)); do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --quick) quick=1 ;;
    --fresh) fresh=1 ;;
    --budget) budget="${2:-}"; shift ;;
    --only) only="${2:-}"; shift ;;
    -*) echo "gpu_acceptance.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    *) if [[ -n "$out" ]]; then echo "gpu_acceptance.sh: one OUT_DIR, got $1 too" >&2; exit 2; fi; out="$1" ;;
  esac
  shift
done
[[ -n "$out" ]] || { echo "gpu_acceptance.sh: expected OUT_DIR" >&2; usage >&2; exit 2; }
budget="${budget:-$([[ -n "$quick" ]] && echo 285 || echo 570)}"
[[ "$budget" =~ ^[0-9]+$ ]] || { echo "gpu_acceptance.sh: --budget: expected seconds, got $budget" >&2; exit 2; }

python="${PYTHON:-python3}"
state="${MK_STATE:-out/gpu-acceptance}${quick:+-quick}"
stages="environment build tests sanitizer micro tune decode middle large training profile kernels"
for name in ${only//,/ }; do
  [[ " $stages " == *" $name "* ]] || { echo "gpu_acceptance.sh: --only: expected of $stages, got $name" >&2; exit 2; }
done

if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  # MK_DRY_RUN=1 goes through the motions with stages that do nothing: the tests use it.
  if [[ "${MK_DRY_RUN:-}" != 1 ]]; then
    echo "gpu_acceptance.sh: expected an NVIDIA GPU that $python's torch can use, got none" >&2
    exit 2
  fi
fi

[[ -n "$fresh" ]] && rm -rf "$state"
mkdir -p "$out" "$state/logs" || exit 2
commit="$(git rev-parse HEAD 2>/dev/null || cat "$state/commit" 2>/dev/null || echo unknown)"
if [[ "$(cat "$state/commit" 2>/dev/null)" != "$commit" ]]; then
  rm -f "$state"/*.done "$state"/*.failed
  echo "$commit" >"$state/commit"
fi

export TRITON_INTERPRET=0 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONUNBUFFERED=1
export MAESTRO_KERNELS_CACHE="$PWD/$state/cache" TRITON_CACHE_DIR="$PWD/$state/triton" TORCHINDUCTOR_CACHE_DIR="$PWD/$state/inductor"
[[ "$state" == /* ]] && export MAESTRO_KERNELS_CACHE="$state/cache" TRITON_CACHE_DIR="$state/triton" TORCHINDUCTOR_CACHE_DIR="$state/inductor"
[[ -f "$state/table.json" ]] && export MAESTRO_KERNELS_TABLE="$(realpath "$state/table.json")" || export MAESTRO_KERNELS_TABLE=off

# collect: the result files, as they are now; called after every stage, so that a killed run leaves what it has.
collect() {
  for file in environment.json micro.json table.json rows.jsonl report.html; do
    [[ -f "$state/$file" ]] && head -c 16000000 "$state/$file" >"$out/$file"
  done
  [[ -f "$state/profile/report.html" ]] && cp "$state/profile/report.html" "$out/profile.html"
  for name in $stages; do
    [[ -f "$state/logs/$name" ]] && { echo "===== $name"; tail -c 1000000 "$state/logs/$name"; }
  done >"$out/log.txt"
  summary >"$out/summary.txt"
}

summary() {
  echo "commit $commit${quick:+, --quick}"
  [[ -f "$state/environment.json" ]] && "$python" - "$state/environment.json" <<'EOF'
import json, sys
record = json.load(open(sys.argv[1]))
for device in record["devices"][1:]:
    print(device["name"], device["arch"], f"{device['cores']} cores")
print(", ".join(f"{k} {v}" for k, v in record["versions"].items() if v and k in ("python", "torch", "triton", "cuda", "driver")))
EOF
  for name in $stages; do
    if [[ -f "$state/$name.done" ]]; then echo "passed  $name  $(cat "$state/$name.done")"
    elif [[ -f "$state/$name.failed" ]]; then echo "FAILED  $name  $(cat "$state/$name.failed")"
    else echo "to do   $name"; fi
  done
  [[ -f "$state/logs/micro" ]] && { echo; head -8 "$state/logs/micro"; }
  [[ -f "$state/criteria.txt" ]] && { echo; cat "$state/criteria.txt"; }
}

started=$SECONDS
left=0
# stage NAME LIMIT COMMAND...: run within LIMIT seconds and what is left of the budget; status 3 means "goes on".
stage() {
  local name="$1" limit="$2" begin=$SECONDS rest status
  shift 2
  [[ -n "$only" && ",$only," != *",$name,"* ]] && return
  [[ -f "$state/$name.done" ]] && { echo "done    $name"; return; }
  rest=$((budget - (SECONDS - started)))
  if ((rest < 20)); then left=1; echo "later   $name"; return; fi
  ((limit > rest)) && limit=$rest
  rm -f "$state/$name.failed"
  echo "run     $name (at most $limit s)"
  if [[ "${MK_DRY_RUN:-}" == 1 ]]; then
    eval "${MK_DRY_STAGE:-true}" >"$state/logs/$name" 2>&1
  else
    MK_LIMIT=$((limit > 60 ? limit - 30 : limit / 2)) timeout --kill-after=10 "$limit" "$@" >"$state/logs/$name" 2>&1
  fi
  status=$?
  case $status in
    0) echo "$((SECONDS - begin)) s" >"$state/$name.done" ;;
    3) left=1; budget=0; echo "later   $name: out of time, goes on at the next call" ;;
    124 | 137) echo "stopped after $limit s" >"$state/$name.failed"; echo "FAILED  $name: stopped after $limit s" ;;
    *) echo "status $status: $(tail -n 1 "$state/logs/$name" | cut -c1-150)" >"$state/$name.failed"
       echo "FAILED  $name: status $status, see log.txt" ;;
  esac
  collect
}

environment() {
  command -v nvidia-smi >/dev/null && nvidia-smi
  command -v nvcc >/dev/null && nvcc --version
  "$python" -m maestro_kernels info --json >"$state/environment.json"
}

# A library with CUDA kernels that is there and loads is used; without a compiler Triton is all that is tested.
build() {
  "$python" - <<'EOF' && return 0
import sys
import torch
from maestro_kernels.backends import native
from maestro_kernels.problem import LoDProblem
reason = native.unsupported(LoDProblem(16, 512, 512, 64, 64, torch.bfloat16, torch.device("cuda")))
print(reason or "prebuilt library with CUDA kernels")
sys.exit(reason is not None)
EOF
  if ! command -v nvcc >/dev/null || ! command -v cmake >/dev/null; then
    echo "no nvcc or no cmake: the native library is left out"
    return 0
  fi
  MK_NATIVE=1 "$python" setup.py build_ext --inplace
}

tests() {
  local files="tests/test_gpu.py tests/csrc/test_cuda_sm90.py"
  [[ -n "$quick" ]] || files+=" tests/backends/triton"
  "$python" -m pytest -q -p no:cacheprovider --maxfail=20 ${quick:+-m gpu} $files
}

sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then echo "no compute-sanitizer here"; return 0; fi
  local tool
  for tool in memcheck $([[ -n "$quick" ]] || echo racecheck synccheck); do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider -m gpu \
      tests/test_gpu.py -k small || return
  done
}

micro() { "$python" -m bench.gpu_micro --out "$state/micro.json" ${quick:+--quick}; }

tune() {
  "$python" -m maestro_kernels tune --device cuda --dtype bfloat16 ${quick:+--quick --shape 4096,4096 --rows 1,64,1024} \
    --seconds 0.02 --limit "$MK_LIMIT" --out "$state/table.json"
}

speed() {
  local status
  "$python" -m bench.gpu_suite "$1" --out "$state/rows.jsonl" --limit "$MK_LIMIT" ${quick:+--quick}
  status=$?
  [[ -s "$state/rows.jsonl" ]] &&
    "$python" -m bench.gpu_suite report --out "$state/rows.jsonl" --page "$state/report.html" >"$state/criteria.txt"
  return $status
}

profile() {
  "$python" -m maestro_kernels profile 4096,4096 ${quick:+--ranks 64,256} --rows 1,64,4096 --dtype bfloat16 --device cuda \
    --out "$state/profile"
}

kernels() { "$python" -m bench.gpu_kernels --rows "$state/rows.jsonl" ${quick:+--count 2}; }

use_table() { [[ -f "$state/table.json" ]] && export MAESTRO_KERNELS_TABLE="$(realpath "$state/table.json")"; }

export -f environment build tests sanitizer micro tune speed profile kernels
export python quick state
run() { stage "$1" "$([[ -n "$quick" ]] && echo "$2" || echo "$3")" bash -c "${4:-$1}"; }

#   name        quick full  command
run environment    60   60
run build         240  540
run tests          90  540
run sanitizer      60  540
run micro          60  180
run tune           60  540
use_table
run decode         60  540 "speed decode"
run middle         40  540 "speed middle"
run large          30  540 "speed large"
run training       30  300 "speed training"
run profile        60  300
run kernels        30  120
collect
echo
cat "$out/summary.txt"
if ls "$state"/*.failed >/dev/null 2>&1; then exit 1; fi
exit $((left ? 3 : 0))
