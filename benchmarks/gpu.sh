#!/bin/bash
# All that needs a GPU, in one go: tests, training and answering beside transformers, kernels, the card's own rates.
#
#   bash benchmarks/gpu.sh OUT                          all stages, about ten minutes on one H100; logs in the folder OUT
#   STAGES="tests train" bash benchmarks/gpu.sh OUT     some: tests train predict small full card
#   ON=cpu bash benchmarks/gpu.sh OUT                   tries the script with tiny models, without a GPU
#
# Each stage is bounded in time, and one that fails does not stop the others. Nothing is downloaded: weights are random.
set -u
out=${1:?expected a folder for the logs}; mkdir -p "$out"
stages=${STAGES:-tests train predict small full card}
cd "$(dirname "$0")/.." || exit 1
here=benchmarks; export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
run=(--folder "$out/files" --workers "${WORKERS:-14}"); size=internvl2-2b; large=internvl2-8b; card=()
if [ "${ON:-cuda}" = cpu ]; then
  export IVL_GPU_TESTS=cpu; size=tiny; large=tiny
  run=(--folder "$out/files" --device cpu --rows 24 --steps 6 --warm 2 --new 4 --workers 1 --batch 2 --pack 2048 --max_tiles 2)
  card=(--device cpu --tokens 256 --side 256 --buffer 0.01 --compile no)
fi

stage() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2; shift 2
  local began=$SECONDS
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  echo "== $name: status $?, $((SECONDS - began)) s"
  grep -E '^\||passed|failed|Error|predicts|; torch' "$out/$name.log" | tail -40
}

for name in $stages; do
  case $name in
    tests) stage tests 240 python3 -m pytest -q -p no:cacheprovider -m gpu tests ;;
    train) stage train 300 python3 $here/gpu_run.py --size $size --stages train "${run[@]}"
           [ $size = tiny ] || stage train_compiled 240 python3 $here/gpu_run.py --size $size --stages train --compile "${run[@]}" ;;
    predict) stage predict 240 python3 $here/gpu_run.py --size $size --stages predict "${run[@]}" ;;
    small) cap=(--cap 24); [ $size = tiny ] && cap=()
           stage small 240 python3 $here/gpu_run.py --size $large --stages train --checkpointing --pack 4096 "${cap[@]}" "${run[@]}" ;;
    full) [ $size = tiny ] && full=tiny || full=internvl2-4b
          stage full 300 python3 $here/gpu_run.py --size $full --recipe full --stages train --checkpointing "${run[@]}" ;;
    card) stage card 300 python3 $here/gpu.py --size $size --profile "$out/kernels.txt" "${card[@]}" ;;
    *) echo "unknown stage $name; expected tests, train, predict, small, full or card"; exit 2 ;;
  esac
done
