trtexec=${TRTEXEC:-}
for place in "$(command -v trtexec || true)" /usr/src/tensorrt/bin/trtexec /opt/tensorrt/bin/trtexec; do
  if [ -z "$trtexec" ] && [ -x "$place" ]; then trtexec=$place; fi
done
if [ -z "$trtexec" ]; then
  echo "trtexec is not found. It comes with TensorRT; say where it is: TRTEXEC=/path/to/trtexec $0" >&2
  exit 5
fi
trtexec=$(realpath "$trtexec")
