#!/usr/bin/env bash
# Runs model.engine on the golden inputs with trtexec, and compares its outputs with the golden ones.
# Needs no Python. Exit code 0: all agree; 3: an output differs; 1: trtexec failed; 5: trtexec is not found.
set -euo pipefail
cd "$(dirname "$0")"

@TRTEXEC@

if [ ! -f model.engine ]; then
  echo "model.engine is not there. Build it: ./build.sh" >&2
  exit 1
fi
tolerance=@TOLERANCE@ # largest error, of the largest golden value
help=$("$trtexec" --help 2>&1 || true)
outcome=0

# numbers TYPE FILE: the numbers of a raw file, one a line
numbers() {
  case $1 in
    float32) od -An -v -w4 -t f4 "$2" ;;
    int32) od -An -v -w4 -t d4 "$2" ;;
    int64) od -An -v -w8 -t d8 "$2" ;;
    float16) od -An -v -w2 -t u2 "$2" | halves 5 10 ;;
    bfloat16) od -An -v -w2 -t u2 "$2" | halves 8 7 ;;
  esac
}

# halves EXPONENT MANTISSA: floats of 16 bits from their bits, by how many of them are which
halves() {
  awk -v e="$1" -v m="$2" '{
    exponent = int($1 / 2 ^ m) % 2 ^ e; mantissa = $1 % 2 ^ m / 2 ^ m; bias = 2 ^ (e - 1) - 1
    value = exponent ? 2 ^ (exponent - bias) * (1 + mantissa) : 2 ^ (1 - bias) * mantissa
    if (exponent == 2 ^ e - 1) print "nan"; else printf "%.9g\n", $1 < 32768 ? value : -value
  }'
}

# compare PROFILE OUTPUT TYPE: what trtexec left in results/ with the golden values
compare() {
  local golden="golden/$1/out/$2.bin" found=("results/$1/$2".output.*.raw)
  if [ ! -f "${found[0]}" ] || [ "$(wc -c <"${found[0]}")" != "$(wc -c <"$golden")" ]; then
    echo "$1: $2: FAILED, trtexec wrote no such output of this size"
    outcome=3
    return
  fi
  paste <(numbers "$3" "${found[0]}") <(numbers "$3" "$golden") | awk -v what="$1: $2" -v limit="$tolerance" '
    $1 !~ /^-?[0-9]/ { strange++; next }
    {
      error = $1 > $2 ? $1 - $2 : $2 - $1; if (error > worst) worst = error
      size = $2 < 0 ? -$2 : $2; if (size > largest) largest = size
    }
    END {
      good = NR && !strange && worst <= limit * largest
      printf "%s: %s, largest error %.2g of %.3g (limit %g)", what, good ? "ok" : "FAILED", worst, largest, limit
      if (strange) printf ", %d of %d values are not finite", strange, NR
      print ""; exit good ? 0 : 3
    }' || outcome=3
}

# check PROFILE INDEX: one run of a profile, on `inputs` (name:shape), for `outputs` (name:type)
check() {
  local profile=$1 shapes="" loads="" references="" own=() item
  for item in "${inputs[@]}"; do
    shapes+=",$item"
    case x${item##*:}x in
      *x0x*) ;; # of an empty cache trtexec reads no file
      *) loads+=",${item%:*}:../../golden/$profile/in/${item%:*}.bin" ;;
    esac
  done
  for item in "${outputs[@]}"; do
    references+=",${item%:*}:../../golden/$profile/out/${item%:*}.bin"
  done
  case $help in # trtexec can compare too, since 11.1; not enough alone, since it lets NaN and bfloat16 pass
    *--accuracyAlgorithm*)
      own=(--loadRefOutputs="${references#,}" --accuracyAlgorithm=cos --accuracyThreshold="$tolerance") ;;
  esac
  rm -rf "results/$profile"
  mkdir -p "results/$profile"
  if ! (cd "results/$profile" &&
    "$trtexec" --loadEngine=../../model.engine@LOAD@ --useProfile="$2" --shapes="${shapes#,}" \
      --loadInputs="${loads#,}" ${own[@]+"${own[@]}"} --iterations=1 --warmUp=0 --duration=0 \
      --dumpRawBindingsToFile >trtexec.log 2>&1); then
    if ! grep -q 'Accuracy validation FAILED' "results/$profile/trtexec.log"; then
      echo "$profile: FAILED, trtexec says:" >&2
      grep '\[E\]' "results/$profile/trtexec.log" >&2 || tail -n 20 "results/$profile/trtexec.log" >&2
      outcome=1
      return
    fi
    echo "$profile: FAILED, by trtexec's own comparison"
    outcome=3
  fi
  for item in "${outputs[@]}"; do compare "$profile" "${item%:*}" "${item##*:}"; done
}

@CHECKS@
if [ "$outcome" = 0 ]; then echo "PASSED: the engine computes what the model computes"; else echo "FAILED"; fi
exit "$outcome"
